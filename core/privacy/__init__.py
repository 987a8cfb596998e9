"""Privacy: plan, accounting, ledger and mechanisms, which every claim rests on."""
