"""The mixer: a page on which energies are mixed and sampled while one looks on."""

import os

# Gradio reads this when it is imported: nothing is reported to anyone.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
