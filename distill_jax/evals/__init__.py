"""How good a network is: accuracy, fidelity to its teachers, calibration."""
