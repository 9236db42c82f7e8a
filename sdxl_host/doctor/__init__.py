"""What `sdxl-host doctor` looks at on a machine and in an installation."""
