"""OpenVINO on a CPU, and on Intel's other devices."""
