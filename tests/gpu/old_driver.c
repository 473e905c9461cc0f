/* A libcuda.so.1 that says it is a driver for CUDA 11.4 and knows nothing else: for what a run says
 * of a driver that is too old. Stage features of tests/gpu.sh puts it before the machine's. */
int cuDriverGetVersion(int *version);

int cuDriverGetVersion(int *version)
{
    *version = 11040;
    return 0;
}
