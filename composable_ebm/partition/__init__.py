"""Log normalising constants: ratios between two energies, and absolute ones by annealing."""
