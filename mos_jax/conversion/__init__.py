"""From what lies at a path to another format, with a check of what was written."""
