"""The walls between environments: each server that keeps the declared matrix, planned, put up and checked."""
