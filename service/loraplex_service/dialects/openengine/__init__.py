"""OpenEngine (`openengine.v1`): the definition between engines and orchestrators that no vendor owns."""
