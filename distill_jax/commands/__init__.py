"""What the command line can do, a file each: train, plan, show, report, evaluate, export, measure."""
