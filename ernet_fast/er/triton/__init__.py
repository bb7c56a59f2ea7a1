"""The ER operators in Triton: kernels, launches, tiling and registration."""
