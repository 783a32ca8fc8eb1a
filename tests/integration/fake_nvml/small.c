/* A small library that conforms to NVML as far as it goes: two GPUs, few facts.
 *
 * What it lacks (memory with the driver's reserve, energy, clocks, process lists, names of the
 * driver) is lacking on purpose: an old or foreign library lacks things too, and what it cannot
 * tell must show up as absent, never as a number.
 */

#include <string.h>

typedef int nvmlReturn_t;
typedef struct gpu *nvmlDevice_t;

enum { NVML_SUCCESS = 0, NVML_ERROR_UNINITIALIZED = 1, NVML_ERROR_INVALID_ARGUMENT = 2,
       NVML_ERROR_NOT_SUPPORTED = 3, NVML_ERROR_INSUFFICIENT_SIZE = 7 };

typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned int gpu, memory; } nvmlUtilization_t;

struct gpu {
    const char *uuid, *name;
    unsigned long long total, used; /* bytes */
    unsigned int utilization_percent, celsius, milliwatts;
};

static struct gpu gpus[] = {
    {"GPU-f0f0f0f0-0000-4000-8000-000000000001", "Foreign Accelerator 24G",
     24ULL << 30, 3ULL << 30, 42, 51, 123456},
    {"GPU-f0f0f0f0-0000-4000-8000-000000000002", "Foreign Accelerator 24G",
     24ULL << 30, 1ULL << 30, 0, 30, 20000},
};
enum { GPU_COUNT = sizeof gpus / sizeof gpus[0] };

static int sessions;

static nvmlReturn_t put_text(const char *text, char *out, unsigned int size)
{
    if (sessions == 0)
        return NVML_ERROR_UNINITIALIZED;
    if (strlen(text) >= size)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    sessions++;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlShutdown(void)
{
    if (sessions == 0)
        return NVML_ERROR_UNINITIALIZED;
    sessions--;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count)
{
    *count = GPU_COUNT;
    return sessions ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *gpu)
{
    if (sessions == 0)
        return NVML_ERROR_UNINITIALIZED;
    if (index >= GPU_COUNT)
        return NVML_ERROR_INVALID_ARGUMENT;
    *gpu = &gpus[index];
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t gpu, char *uuid, unsigned int size)
{
    return put_text(gpu->uuid, uuid, size);
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t gpu, char *name, unsigned int size)
{
    return put_text(gpu->name, name, size);
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t gpu, nvmlMemory_t *memory)
{
    memory->total = gpu->total;
    memory->used = gpu->used;
    memory->free = gpu->total - gpu->used;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t gpu, nvmlUtilization_t *rates)
{
    rates->gpu = gpu->utilization_percent;
    rates->memory = 0xFFFFFFFF; /* the sentinel for "not available" */
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t gpu, int sensor, unsigned int *celsius)
{
    *celsius = gpu->celsius;
    return sensor == 0 ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t gpu, unsigned int *milliwatts)
{
    *milliwatts = gpu->milliwatts;
    return NVML_SUCCESS;
}
