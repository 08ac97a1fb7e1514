"""Work trees and git: series applied to an sdist or to a checkout, and how a tree stands to a series."""
