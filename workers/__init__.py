"""The data plane: tensors. Never imports the control plane."""
