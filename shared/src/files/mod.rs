//! File trees (bundle, root file system, kernel) that travel with a workload.
