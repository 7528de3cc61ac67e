/* libcuda.so.1 of no GPU: what Triton asks of the driver is answered as on a card that is there, and nothing runs. What a launch was given
   is kept: see launched(). */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef struct {
  unsigned gridX, gridY, gridZ, blockX, blockY, blockZ, shared;
  void *stream;
  void *attributes;
  unsigned count;
} Config;

typedef struct {
  uint64_t function, stream, grid[3], block, shared, attributes, bytes;
  unsigned char parameters[2048];
} Launch;

enum { MAX_SIZES = 64 };
static Launch last;
static uint64_t launches, functions = 0x1000, maps;
static int sizes[MAX_SIZES], size_count;
static void *context = (void *)1;

/* Bytes of each parameter of the kernels that are launched from now on: without them none is kept. */
void parameter_sizes(const int *given, int count) {
  size_count = count > MAX_SIZES ? MAX_SIZES : count;
  memcpy(sizes, given, size_count * sizeof(int));
}
const Launch *launched(void) { return &last; }
uint64_t launch_count(void) { return launches; }
uint64_t map_count(void) { return maps; }

Result cuLaunchKernelEx(const Config *c, void *function, void **parameters, void **extra) {
  launches++;
  if (size_count) {
    memset(&last, 0, sizeof(last));
    last.function = (uint64_t)function;
    last.stream = (uint64_t)c->stream;
    last.grid[0] = c->gridX, last.grid[1] = c->gridY, last.grid[2] = c->gridZ;
    last.block = c->blockX, last.shared = c->shared, last.attributes = c->count;
    for (int i = 0; i < size_count && last.bytes + sizes[i] <= sizeof(last.parameters); i++) {
      memcpy(last.parameters + last.bytes, parameters[i], sizes[i]);
      last.bytes += sizes[i];
    }
  }
  return 0;
}
Result cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *shape, const uint64_t *strides,
                              const uint32_t *box, const uint32_t *element_strides, int interleave, int swizzle, int l2, int fill) {
  uint64_t *out = map;
  memset(map, 0, 128);
  maps++;
  if ((uintptr_t)address % 16) return 1;
  out[0] = (uint64_t)address, out[1] = type, out[2] = rank, out[3] = shape[0], out[4] = rank > 1 ? shape[1] : 0;
  out[5] = rank > 1 ? strides[0] : 0, out[6] = box[0], out[7] = rank > 1 ? box[1] : 0, out[8] = swizzle, out[9] = fill;
  return 0;
}
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)(functions += 16); return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
Result cuCtxGetCurrent(void **current) { *current = context; return 0; }
Result cuCtxSetCurrent(void *given) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 10 ? 32 : 232448; return 0; }
Result cuDevicePrimaryCtxRetain(void **retained, int device) { *retained = context; return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "an error of the driver that is none"; return 0; }
Result cuInit(unsigned flags) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, const Config *config) { *count = 1; return 0; }
