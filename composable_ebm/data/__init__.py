"""Labelled images: what experts learn from and what judges compare with.

Each data set is a module with a `load` function that returns `LabelledImages`. Import the module
that you want (`from composable_ebm.data import digits`): none is imported here, because each may
need packages that the others do without.
"""

from composable_ebm.data.dataset import LabelledImages

__all__ = ["LabelledImages"]
