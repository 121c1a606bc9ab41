"""Hook points, and the module that runs with them: everything about a hook that no model is needed for."""
