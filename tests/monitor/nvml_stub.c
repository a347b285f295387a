/* A stand-in for libnvidia-ml.so.1: its GPUs and their values are lines "GPU.KEY=VALUE" of the file CRCJAX_NVML_STUB, read at
   every call, so that a test can change them. A value "!15" makes the call return the error 15; a missing one is error 3, not
   supported. "0.xid=79" is an event that is delivered once for each change of "0.xid_number". */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
static long delivered[16];

static int look_up(long gpu, const char *key, u64 *value) {
  char line[256], wanted[128];
  const char *path = getenv("CRCJAX_NVML_STUB");
  FILE *file = path ? fopen(path, "r") : NULL;
  int status = 3;
  if (!file) return 3;
  snprintf(wanted, sizeof wanted, "%ld.%s=", gpu, key);
  while (fgets(line, sizeof line, file))
    if (!strncmp(line, wanted, strlen(wanted))) {
      const char *text = line + strlen(wanted);
      if (*text == '!') status = atoi(text + 1);
      else { *value = strtoull(text, NULL, 10); status = 0; }
    }
  fclose(file);
  return status;
}
static int unsigned_value(void *device, const char *key, unsigned *value) {
  u64 wide = 0;
  int status = look_up((long)device - 1, key, &wide);
  *value = (unsigned)wide;
  return status;
}
int nvmlInitWithFlags(unsigned flags) { return flags ? 2 : 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 3 ? "Not Supported" : "an error of the stand-in"; }
int nvmlDeviceGetCount_v2(unsigned *count) {
  u64 memory;
  for (*count = 0; look_up(*count, "memory_total", &memory) != 3;) ++*count;
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(long)(index + 1); return 0; }
int nvmlDeviceGetIndex(void *device, unsigned *index) { *index = (long)device - 1; return 0; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned length) {
  snprintf(text, length, "GPU-000%ld-stub", (long)device - 1);
  return 0;
}
int nvmlDeviceGetName(void *device, char *text, unsigned length) { snprintf(text, length, "stand-in"); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, u64 *memory) {
  int status = look_up((long)device - 1, "memory_total", memory);
  return status ? status : look_up((long)device - 1, "memory_used", memory + 2);
}
int nvmlDeviceGetUtilizationRates(void *device, unsigned *rates) { rates[1] = 0; return unsigned_value(device, "utilisation", rates); }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *value) { return unsigned_value(device, "temperature", value); }
int nvmlDeviceGetPowerUsage(void *device, unsigned *value) { return unsigned_value(device, "power_mw", value); }
int nvmlDeviceGetTotalEnergyConsumption(void *device, u64 *value) { return look_up((long)device - 1, "energy_mj", value); }
int nvmlDeviceGetClockInfo(void *device, int type, unsigned *value) { return unsigned_value(device, "sm_clock", value); }
int nvmlDeviceGetMaxClockInfo(void *device, int type, unsigned *value) { return unsigned_value(device, "sm_clock_max", value); }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, u64 *value) { return look_up((long)device - 1, "throttle", value); }
int nvmlDeviceGetTotalEccErrors(void *device, int type, int counter, u64 *value) {
  return look_up((long)device - 1, type ? "ecc_uncorrected" : "ecc_corrected", value);
}
int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *value) {
  char key[32];
  snprintf(key, sizeof key, "link%u", link);
  return unsigned_value(device, key, value);
}
int nvmlDeviceGetNvLinkErrorCounter(void *device, unsigned link, int kind, u64 *value) {
  return look_up((long)device - 1, "link_errors", value);
}
int nvmlEventSetCreate(void **set) { *set = (void *)1; return 0; }
int nvmlEventSetFree(void *set) { return 0; }
int nvmlDeviceRegisterEvents(void *device, u64 types, void *set) { return types == 8 ? 0 : 2; }
int nvmlEventSetWait_v2(void *set, u64 *event, unsigned timeout_ms) {
  for (long gpu = 0; gpu < 16; ++gpu) {
    u64 number = 0, xid = 0;
    if (look_up(gpu, "xid_number", &number) || (long)number == delivered[gpu]) continue;
    look_up(gpu, "xid", &xid);
    delivered[gpu] = number;
    event[0] = gpu + 1;
    event[1] = 8;
    event[2] = xid;
    return 0;
  }
  return 10;
}
