"""What people see: the progress of long work, tables, plots, files of a report."""
