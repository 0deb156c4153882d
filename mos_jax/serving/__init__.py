"""Many tenants on one base: their arrays on the device, and how many of them fit."""
