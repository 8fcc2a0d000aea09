"""RAVE from TorchScript exports."""
