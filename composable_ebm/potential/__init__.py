"""How a composition is evaluated: energies and gradients by states, in the fastest form that serves."""
