"""Files of controls: ControlNets, T2I-Adapters and IP-Adapters, under diffusers' names."""
