//! Virtual disk formats, differencing chains, jobs and NBD.
