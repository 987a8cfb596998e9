"""EDM diffusion (Karras et al. 2022): network, denoiser, loss, samplers, EMA."""
