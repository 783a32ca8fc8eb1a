/* What the library of nvml.c is asked in bulk: fields, samples, processes, events, GPM. */

#define _GNU_SOURCE
#include <stdlib.h>
#include <unistd.h>

#include "nvml.h"

enum { SAMPLES_MAX = 120 };

/* --- fields: many values by one call */

static nvmlReturn_t field(const struct gpu *gpu, nvmlFieldValue_t *told)
{
    unsigned int link = told->scopeId;
    told->valueType = VALUE_ULL;
    told->value.ullVal = 0;
    switch (told->fieldId) {
    case 1: case 2: /* ECC mode, now and pending */
        told->value.ullVal = 1;
        return NVML_SUCCESS;
    case 3: case 5: /* ECC errors, corrected */
        told->value.ullVal = gpu->index;
        return NVML_SUCCESS;
    case 4: case 6: /* uncorrected */
    case 38: case 45: case 52: case 59: /* NVLink errors: flow control, data, replay, recovery */
    case 75: case 76: case 77: case 78: case 79: /* time that clocks were held down, ns */
    case 95: case 142: case 143: case 144: case 145: /* replay roll-overs, remapped rows */
    case 230: case 269: case 270: case 271: /* recovery action; more reasons of clocks */
        return NVML_SUCCESS;
    case 74: /* the power policy */
        told->value.ullVal = now_us() * 10;
        return NVML_SUCCESS;
    case 82: /* of the memory, degrees */
        told->valueType = VALUE_UINT;
        told->value.uiVal = 50 + swing(gpu) / 4;
        return NVML_SUCCESS;
    case 83: case 191: /* energy, mJ */
        told->value.ullVal = millijoules();
        return NVML_SUCCESS;
    case 90: /* NVLink speed, MB/s */
        told->value.ullVal = 26562;
        return NVML_SUCCESS;
    case 91:
        told->value.ullVal = link_count;
        return NVML_SUCCESS;
    case 94:
        told->value.ullVal = gpu->index;
        return NVML_SUCCESS;
    case 138: case 139: case 140: case 141: /* NVLink traffic, KiB */
        told->value.ullVal = traffic(gpu) / 1024 * (link + 1);
        return link < link_count || link == ~0U ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
    case 161: case 162: case 163: /* of a link: replays, recoveries, CRC */
        return link < link_count ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
    case 164:
        told->value.ullVal = 26562;
        return link < link_count ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
    case 165: case 166:
        told->value.ullVal = told->fieldId == 165 ? 1 : 7;
        return link < link_count ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
    case 185: case 186: /* power, mean and instant, mW */
        told->valueType = VALUE_UINT;
        told->value.uiVal = milliwatts(gpu);
        return NVML_SUCCESS;
    case 187: case 188: case 189: case 190: case 192: /* limits: 187 is the lowest */
        told->valueType = VALUE_UINT;
        told->value.uiVal = told->fieldId == 187 ? 200000 : 700000;
        return NVML_SUCCESS;
    case 193: case 194: case 195: case 196: /* margins: shutdown, slowdown, memory, GPU */
        told->valueType = VALUE_SINT;
        told->value.siVal = told->fieldId == 193 ? -8 : told->fieldId == 194 ? -2 : 0;
        return NVML_SUCCESS;
    case 197: case 198: /* PCIe bytes */
        told->valueType = VALUE_UINT;
        told->value.uiVal = (unsigned int)traffic(gpu);
        return NVML_SUCCESS;
    default:
        return NVML_ERROR_NOT_SUPPORTED;
    }
}

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t gpu, int count, nvmlFieldValue_t *values)
{
    ENTER();
    for (int i = 0; i < count; i++) {
        values[i].timestamp = (long long)now_us();
        values[i].latencyUsec = 1;
        values[i].nvmlReturn = field(gpu, &values[i]);
    }
    return NVML_SUCCESS;
}

/* --- the driver's own samples */

nvmlReturn_t nvmlDeviceGetSamples(nvmlDevice_t gpu, unsigned int kind, unsigned long long since_us,
                                  int *type, unsigned int *count, nvmlSample_t *samples)
{
    /* Power every 100 ms, all else every sixth of a second. */
    unsigned long long step = kind == 0 ? 100000 : 166667, newest = now_us() / step;
    unsigned long long oldest = newest - SAMPLES_MAX + 1, seen = since_us / step + 1;
    unsigned int told = 0;
    ENTER();
    *type = VALUE_UINT;
    if (samples == NULL) {
        *count = SAMPLES_MAX;
        return NVML_SUCCESS;
    }
    for (unsigned long long at = seen > oldest ? seen : oldest; at <= newest && told < *count; at++) {
        samples[told].timeStamp = at * step;
        samples[told++].sampleValue.uiVal =
            kind == 0 ? 450000 + 1000 * (unsigned int)(at % 100)
                      : 50 + (unsigned int)((at + gpu->index) % 50);
    }
    *count = told;
    return told ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

/* --- processes */

static nvmlReturn_t list(unsigned int *count, nvmlProcessInfo_t *processes, unsigned int number)
{
    unsigned int room = *count;
    ENTER();
    *count = number;
    if (number == 0)
        return NVML_SUCCESS;
    if (processes == NULL || room < number)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned int i = 0; i < number; i++)
        processes[i] = (nvmlProcessInfo_t){pids[i], 4 * GIB, ~0U, ~0U};
    return NVML_SUCCESS;
}

#define PROCESSES(function, number) \
    nvmlReturn_t function(nvmlDevice_t gpu, unsigned int *count, nvmlProcessInfo_t *processes) \
    { (void)gpu; return list(count, processes, number); }
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, pid_count)
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, pid_count)
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, 0)
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, 0)
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, 0)

nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t gpu, nvmlProcessUtilizationSample_t *told,
                                             unsigned int *count, unsigned long long since_us)
{
    unsigned int room = *count;
    ENTER();
    (void)since_us;
    *count = pid_count;
    if (told == NULL || room < pid_count)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned int i = 0; i < pid_count; i++)
        told[i] = (nvmlProcessUtilizationSample_t){
            pids[i], now_us(), utilization(gpu) / pid_count, utilization(gpu) / pid_count / 2, 0, 0};
    return NVML_SUCCESS;
}

/* --- events: nothing ever happens */

nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set)
{
    ENTER();
    *set = calloc(1, sizeof **set);
    if (*set == NULL)
        return NVML_ERROR_INSUFFICIENT_RESOURCES;
    count_thing(1);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set)
{
    ENTER();
    free(set);
    count_thing(-1);
    return NVML_SUCCESS;
}

GET(nvmlDeviceGetSupportedEventTypes, unsigned long long, 0x11F)

nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t gpu, unsigned long long types, nvmlEventSet_t set)
{
    ENTER();
    (void)gpu; (void)types; (void)set;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t *event, unsigned int milliseconds)
{
    ENTER();
    (void)set; (void)event;
    if (milliseconds)
        usleep(milliseconds * 1000);
    return NVML_ERROR_TIMEOUT;
}

/* --- GPM */

nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t gpu, nvmlGpmSupport_t *support)
{
    ENTER();
    (void)gpu;
    support->isSupportedDevice = 1;
    return NVML_SUCCESS;
}

GET(nvmlGpmQueryIfStreamingEnabled, unsigned int, 1)

nvmlReturn_t nvmlGpmSampleAlloc(nvmlGpmSample_t *sample)
{
    ENTER();
    *sample = calloc(1, sizeof **sample);
    if (*sample == NULL)
        return NVML_ERROR_INSUFFICIENT_RESOURCES;
    count_thing(1);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlGpmSampleFree(nvmlGpmSample_t sample)
{
    ENTER();
    free(sample);
    count_thing(-1);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlGpmSampleGet(nvmlDevice_t gpu, nvmlGpmSample_t sample)
{
    ENTER();
    (void)gpu;
    sample->taken_at_us = now_us();
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlGpmMetricsGet(nvmlGpmMetricsGet_t *wanted)
{
    ENTER();
    if (wanted->sample1->taken_at_us >= wanted->sample2->taken_at_us)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (unsigned int i = 0; i < wanted->numMetrics; i++) {
        nvmlGpmMetric_t *metric = &wanted->metrics[i];
        int is_ratio = metric->metricId < 20 || (metric->metricId >= 30 && metric->metricId < 60);
        metric->value = is_ratio ? 25.0 + metric->metricId : 1000.0 * metric->metricId;
        metric->nvmlReturn = NVML_SUCCESS;
    }
    return NVML_SUCCESS;
}
