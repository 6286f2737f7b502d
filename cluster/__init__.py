"""The ground floor: settings, storage, models, Ray, the command line. Knows nothing of sampling, training or serving."""
