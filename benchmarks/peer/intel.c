/* MKL asks these whether the processor is Intel's, and takes slower paths elsewhere. Preloaded, it takes the same everywhere. */
int mkl_serv_intel_cpu_true(void) { return 1; }
int mkl_serv_intel_cpu(void) { return 1; }
