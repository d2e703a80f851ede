"""One small file for each form a diff is shown in; none knows of the others."""
