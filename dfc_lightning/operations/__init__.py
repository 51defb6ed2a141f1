"""How one torch operation passes deviations on, and errors back."""
