"""Attribution: what quantizing each component costs, from calibration data alone, before any plan is run."""
