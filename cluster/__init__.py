"""The base of all packages: settings, storage, published folders, models, leases, Ray and progress. Imports no other package of Cappy."""
