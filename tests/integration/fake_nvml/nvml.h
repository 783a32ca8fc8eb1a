/* What nvml.c and batches.c share: NVML's types as nvidia-ml-py lays them out, the cards' state. */

#ifndef FAKE_NVML_H
#define FAKE_NVML_H

typedef int nvmlReturn_t;
typedef struct gpu *nvmlDevice_t;

enum { NVML_SUCCESS = 0, NVML_ERROR_UNINITIALIZED = 1, NVML_ERROR_INVALID_ARGUMENT = 2,
       NVML_ERROR_NOT_SUPPORTED = 3, NVML_ERROR_NOT_FOUND = 6, NVML_ERROR_INSUFFICIENT_SIZE = 7,
       NVML_ERROR_TIMEOUT = 10, NVML_ERROR_INSUFFICIENT_RESOURCES = 23 };
enum { VALUE_DOUBLE = 0, VALUE_UINT = 1, VALUE_ULONG = 2, VALUE_ULL = 3, VALUE_SINT = 5 };

typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } nvmlMemory_v2_t;
typedef struct { unsigned long long total, free, used; } nvmlBAR1Memory_t;
typedef struct { unsigned int gpu, memory; } nvmlUtilization_t;
typedef struct {
    char busIdLegacy[16];
    unsigned int domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;
typedef struct {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;
typedef struct {
    unsigned int pid;
    unsigned long long timeStamp;
    unsigned int smUtil, memUtil, encUtil, decUtil;
} nvmlProcessUtilizationSample_t;
typedef union {
    double dVal;
    unsigned int uiVal;
    unsigned long ulVal;
    unsigned long long ullVal;
    long long sllVal;
    int siVal;
} nvmlValue_t;
typedef struct { unsigned long long timeStamp; nvmlValue_t sampleValue; } nvmlSample_t;
typedef struct {
    unsigned int fieldId, scopeId;
    long long timestamp, latencyUsec;
    int valueType;
    nvmlReturn_t nvmlReturn;
    nvmlValue_t value;
} nvmlFieldValue_t;
typedef struct { unsigned long long referenceTime, violationTime; } nvmlViolationTime_t;
typedef struct { unsigned int version; int sensorType, temperature; } nvmlTemperature_t;
typedef struct { unsigned int version; int marginTemperature; } nvmlMarginTemperature_t;
typedef struct { unsigned int max, high, partial, low, none; } nvmlRowRemapperHistogramValues_t;
typedef struct event_set { int events; } *nvmlEventSet_t;
typedef struct {
    nvmlDevice_t device;
    unsigned long long eventType, eventData;
    unsigned int gpuInstanceId, computeInstanceId;
} nvmlEventData_t;
typedef struct gpm_sample { unsigned long long taken_at_us; } *nvmlGpmSample_t;
typedef struct { unsigned int version, isSupportedDevice; } nvmlGpmSupport_t;
typedef struct {
    unsigned int metricId;
    nvmlReturn_t nvmlReturn;
    double value;
    const char *shortName, *longName, *unit;
} nvmlGpmMetric_t;
typedef struct {
    unsigned int version, numMetrics;
    nvmlGpmSample_t sample1, sample2;
    nvmlGpmMetric_t metrics[];
} nvmlGpmMetricsGet_t;

struct gpu { unsigned int index; char uuid[80], bus_id[32]; };

enum { PIDS_MAX = 32 };
#define MIB (1ULL << 20)
#define GIB (1ULL << 30)
#pragma GCC visibility push(hidden)
extern unsigned int link_count, pid_count, pids[PIDS_MAX];
unsigned long long now_us(void);
unsigned int swing(const struct gpu *gpu); /* 0 to 99 */
unsigned int utilization(const struct gpu *gpu); /* percent */
unsigned int milliwatts(const struct gpu *gpu);
unsigned long long millijoules(void);
unsigned long long traffic(const struct gpu *gpu); /* bytes */
int enter(void); /* counts a call; 0 outside of a session */
void count_thing(long long more); /* what was made by a call, less what was freed */
#pragma GCC visibility pop

/* Every function begins so: the call is counted, and nothing works outside of a session. */
#define ENTER() do { if (!enter()) return NVML_ERROR_UNINITIALIZED; } while (0)

/* The usual forms: one value of a GPU; two; one that another argument chooses; none on this card. */
#define GET(function, type, value) \
    nvmlReturn_t function(nvmlDevice_t gpu, type *out) \
    { ENTER(); (void)gpu; *out = (value); return NVML_SUCCESS; }
#define GET_TWO(function, first, second) \
    nvmlReturn_t function(nvmlDevice_t gpu, unsigned int *one, unsigned int *two) \
    { ENTER(); (void)gpu; *one = (first); *two = (second); return NVML_SUCCESS; }
#define GET_OF(function, type, value) \
    nvmlReturn_t function(nvmlDevice_t gpu, unsigned int which, type *out) \
    { ENTER(); (void)gpu; (void)which; *out = (value); return NVML_SUCCESS; }
#define GET_NONE(function) \
    nvmlReturn_t function(nvmlDevice_t gpu) { ENTER(); (void)gpu; return NVML_ERROR_NOT_SUPPORTED; }

#endif
