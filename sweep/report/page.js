// Draws every figure in the colours of the page, and again when the reader's theme changes.
const source = document.getElementById("figures").textContent;
// Dragging on a phone scrolls the page, and its buttons would cover the plot.
const coarse = matchMedia("(pointer: coarse)").matches;
const config = { responsive: true, displaylogo: false, displayModeBar: coarse ? false : "hover" };

function draw() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const named = source.replace(/"(--[a-z]+)"/g, (_, name) => JSON.stringify(colour(name)));
  const axis = { gridcolor: colour("--rule"), linecolor: colour("--soft"), zeroline: false, automargin: true };
  const template = {
    layout: {
      font: { family: "system-ui, sans-serif", size: 13, color: colour("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--soft"), font: { color: colour("--ink") } },
      hovermode: "closest",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      margin: { l: 56, r: 16, t: 24, b: 48 },
      modebar: { color: colour("--soft"), activecolor: colour("--ink"), bgcolor: "rgba(0,0,0,0)" },
      dragmode: coarse ? false : "zoom",
      xaxis: axis,
      yaxis: axis,
    },
  };
  for (const { id, data, layout } of JSON.parse(named)) {
    // A narrow plot has no room for names; the table below it has them.
    if (innerWidth < 600) data.forEach((trace) => { trace.mode = trace.mode?.replace("+text", ""); });
    Plotly.react(id, data, { ...layout, template }, config);
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
