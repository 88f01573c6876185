"""Time, memory and quality of the package itself; each benchmark writes a file under reports/."""
