"""Random inputs of attention, selection and experts, and what comes of them by definition: for tests and checks."""
