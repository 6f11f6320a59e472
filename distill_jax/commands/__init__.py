"""What the command line can do, a file each: train, plan, show, report, evaluate and so on."""
