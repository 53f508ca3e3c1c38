// Stands in for libcuda.so.1 where there is no GPU: every call succeeds, and the last launch is kept byte by byte.
#include <stdint.h>
#include <string.h>

static int sizes[64], count;
static unsigned char kept[1024];
static uintptr_t functions;

// Bytes of each parameter of the next launch.
void stub_expect(int n, const int *bytes) {
    count = n;
    if (n) memcpy(sizes, bytes, n * sizeof(int));
}

// Grid, block, shared memory, stream and function, then the parameters; cleared by reading.
int stub_take(unsigned char *out) {
    int total = 48;
    for (int i = 0; i < count; ++i) total += sizes[i];
    memcpy(out, kept, total);
    memset(kept, 0xff, sizeof kept);
    return total;
}

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
    unsigned char *to = kept;
    memcpy(to, config, 28);
    memcpy(to + 32, (const char *)config + 32, 8);
    memset(to + 28, 0, 4);
    memcpy(to + 40, &function, 8);
    to += 48;
    for (int i = 0; i < count; to += sizes[i++]) memcpy(to, parameters[i], sizes[i]);
    return 0;
}

int cuPointerGetAttribute(uint64_t *out, int attribute, uint64_t pointer) { *out = pointer; return 0; }
int cuCtxGetCurrent(void **out) { *out = (void *)1; return 0; }
int cuModuleLoadData(void **out, const void *image) { *out = (void *)1; return 0; }
int cuModuleGetFunction(void **out, void *module, const char *name) { *out = (void *)++functions; return 0; }
int cuDeviceGetAttribute(int *out, int attribute, int device) { *out = 227 << 10; return 0; }
int cuFuncGetAttribute(int *out, int attribute, void *function) { *out = 1024; return 0; }
int cuDriverGetVersion(int *out) { *out = 13000; return 0; }
int cuGetErrorString(int error, const char **out) { *out = "none"; return 0; }
int cuDeviceGet(int *out, int ordinal) { *out = 0; return 0; }
int cuCtxGetDevice(int *out) { *out = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **out, int device) { *out = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *out, int limit) { *out = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuStreamIsCapturing(void *stream, int *out) { *out = 0; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuOccupancyMaxActiveClusters(int *out, void *function, const void *config) { *out = 1; return 0; }
