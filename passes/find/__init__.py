"""Find: which submodules to capture, and which of their axes are couplings."""
