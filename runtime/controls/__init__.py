"""Pictures that steer a drawing: ready maps, or prepared here from other pictures."""
