"""Find: the submodules to capture, and the axes of them that are couplings."""
