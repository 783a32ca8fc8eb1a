/* A library that conforms to NVML: eight busy cards of Hopper with NVLink, and what monitors ask of them.
 *
 * It is for measuring what asking costs: a call takes some tens of nanoseconds here, where a real
 * driver takes from one microsecond to milliseconds. So what is measured on it is the asker alone.
 *
 * Environment: FAKE_NVML_GPUS (8), FAKE_NVML_LINKS (18, of each GPU), FAKE_NVML_PIDS (processes on
 * each GPU: real PIDs with commas between; the caller's own), FAKE_NVML_PAGE (a file of 16 bytes or
 * more: into its first 8 bytes the calls are counted, over all processes that have it; into the
 * next 8 what was made by a call, event sets and GPM samples, and is not yet freed).
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "nvml.h"

enum { GPUS_MAX = 64, MIG_DEVICES_MAX = 7, NEIGHBOUR_LINKS = 4, PAGE_BYTES = 4096 };

struct page { unsigned long long calls, things; };

unsigned int link_count = 18, pid_count, pids[PIDS_MAX];
static unsigned int gpu_count = 8;
static struct gpu gpus[GPUS_MAX];
static struct page own_page, *page = &own_page;
static int sessions;

static unsigned int number_of(const char *variable, unsigned int usual, unsigned int most)
{
    const char *text = getenv(variable);
    unsigned int number = text ? (unsigned int)strtoul(text, NULL, 10) : usual;
    return number < most ? number : most;
}

__attribute__((constructor)) static void begin(void)
{
    gpu_count = number_of("FAKE_NVML_GPUS", gpu_count, GPUS_MAX);
    link_count = number_of("FAKE_NVML_LINKS", link_count, link_count);
    for (unsigned int i = 0; i < GPUS_MAX; i++) {
        gpus[i].index = i;
        snprintf(gpus[i].uuid, sizeof gpus[i].uuid, "GPU-f0f0f0f0-0000-4000-8000-%012u", i + 1);
        snprintf(gpus[i].bus_id, sizeof gpus[i].bus_id, "00000000:%02X:00.0", i + 1);
    }
    for (const char *at = getenv("FAKE_NVML_PIDS"); at && *at && pid_count < PIDS_MAX;) {
        char *end;
        pids[pid_count++] = (unsigned int)strtoul(at, &end, 10);
        at = *end ? end + 1 : end;
    }
    if (pid_count == 0)
        pids[pid_count++] = (unsigned int)getpid();
    const char *path = getenv("FAKE_NVML_PAGE");
    int file = path ? open(path, O_RDWR) : -1;
    if (file >= 0) {
        void *shared = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (shared != MAP_FAILED)
            page = shared;
        close(file);
    }
}

int enter(void)
{
    __atomic_fetch_add(&page->calls, 1, __ATOMIC_RELAXED);
    return sessions > 0;
}

void count_thing(long long more) { __atomic_fetch_add(&page->things, more, __ATOMIC_RELAXED); }

unsigned long long now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (unsigned long long)now.tv_sec * 1000000ULL + (unsigned long long)now.tv_nsec / 1000ULL;
}

/* --- how the values move: each GPU a little other than its neighbour, a swing of ten seconds */

unsigned int swing(const struct gpu *gpu)
{
    return (unsigned int)((now_us() / 100000 + gpu->index * 17) % 100);
}

unsigned int utilization(const struct gpu *gpu) { return 50 + swing(gpu) / 2; }
unsigned int milliwatts(const struct gpu *gpu) { return 450000 + 2000 * swing(gpu); }
unsigned long long millijoules(void) { return now_us() / 1000 * 550 % (1ULL << 50); }
unsigned long long traffic(const struct gpu *gpu) { return now_us() * (100 + gpu->index); }
static unsigned long long memory_used(void) { return pid_count * 4 * GIB + 600 * MIB; }

/* --- the library and its GPUs */

nvmlReturn_t nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    enter();
    sessions++;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void)
{
    ENTER();
    sessions--;
    return NVML_SUCCESS;
}

static nvmlReturn_t put_text(const char *text, char *out, unsigned int size)
{
    ENTER();
    if (strlen(text) >= size)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NVML_SUCCESS;
}

#define SYSTEM_TEXT(function, text) \
    nvmlReturn_t function(char *out, unsigned int size) { return put_text(text, out, size); }
#define GPU_TEXT(function, text) \
    nvmlReturn_t function(nvmlDevice_t gpu, char *out, unsigned int size) \
    { (void)gpu; return put_text(text, out, size); }

SYSTEM_TEXT(nvmlSystemGetDriverVersion, "580.95.05")
SYSTEM_TEXT(nvmlSystemGetNVMLVersion, "13.580.95.05")

nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version)
{
    ENTER();
    *version = 13000;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    return nvmlSystemGetCudaDriverVersion(version);
}

nvmlReturn_t nvmlSystemGetProcessName(unsigned int pid, char *out, unsigned int size)
{
    (void)pid;
    return put_text("/usr/bin/train", out, size);
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count)
{
    ENTER();
    *count = gpu_count;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *gpu)
{
    ENTER();
    if (index >= gpu_count)
        return NVML_ERROR_INVALID_ARGUMENT;
    *gpu = &gpus[index];
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *gpu)
{
    ENTER();
    for (unsigned int i = 0; i < gpu_count; i++)
        if (strcmp(uuid, gpus[i].uuid) == 0) {
            *gpu = &gpus[i];
            return NVML_SUCCESS;
        }
    return NVML_ERROR_NOT_FOUND;
}

static void fill_pci(const struct gpu *gpu, nvmlPciInfo_t *info)
{
    memset(info, 0, sizeof *info);
    info->bus = gpu->index + 1;
    info->pciDeviceId = 0x233010DE;
    info->pciSubSystemId = 0x16C110DE;
    strcpy(info->busId, gpu->bus_id);
    strcpy(info->busIdLegacy, gpu->bus_id + 4);
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t gpu, nvmlPciInfo_t *info)
{
    ENTER();
    fill_pci(gpu, info);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryAffinity(nvmlDevice_t gpu, unsigned int words,
                                         unsigned long *nodes, unsigned int scope)
{
    ENTER();
    (void)scope;
    memset(nodes, 0, words * sizeof *nodes);
    nodes[0] = gpu->index < (gpu_count + 1) / 2 ? 1 : 2;
    return NVML_SUCCESS;
}

GPU_TEXT(nvmlDeviceGetName, "NVIDIA H100 80GB HBM3")
GPU_TEXT(nvmlDeviceGetUUID, gpu->uuid)
GPU_TEXT(nvmlDeviceGetSerial, "1650000000001")
GPU_TEXT(nvmlDeviceGetBoardPartNumber, "692-2G520-0200-000")
GPU_TEXT(nvmlDeviceGetVbiosVersion, "96.00.89.00.01")
GET(nvmlDeviceGetIndex, unsigned int, gpu->index)
GET(nvmlDeviceGetMinorNumber, unsigned int, gpu->index)
GET(nvmlDeviceGetArchitecture, unsigned int, 9)
GET(nvmlDeviceGetBrand, unsigned int, 15)
GET(nvmlDeviceIsMigDeviceHandle, unsigned int, 0)
GET(nvmlDeviceGetMaxMigDeviceCount, unsigned int, MIG_DEVICES_MAX)
GET(nvmlDeviceGetPersistenceMode, unsigned int, 1)
GET(nvmlDeviceGetComputeMode, unsigned int, 0)
GET(nvmlDeviceGetDisplayMode, unsigned int, 0)
GET(nvmlDeviceGetDisplayActive, unsigned int, 0)
GET_TWO(nvmlDeviceGetCudaComputeCapability, 9, 0)
GET_TWO(nvmlDeviceGetMigMode, 0, 0)
GET_TWO(nvmlDeviceGetEccMode, 1, 1)

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t gpu, unsigned int index,
                                                 nvmlDevice_t *device)
{
    ENTER();
    (void)gpu; (void)index; (void)device;
    return NVML_ERROR_NOT_FOUND;
}

/* --- memory, load, clocks, power, heat */

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t gpu, nvmlMemory_t *memory)
{
    ENTER();
    (void)gpu;
    memory->total = 81559 * MIB;
    memory->used = memory_used();
    memory->free = memory->total - memory->used;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t gpu, nvmlMemory_v2_t *memory)
{
    ENTER();
    (void)gpu;
    memory->total = 81559 * MIB;
    memory->reserved = 551 * MIB;
    memory->used = memory_used();
    memory->free = memory->total - memory->reserved - memory->used;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t gpu, nvmlBAR1Memory_t *memory)
{
    ENTER();
    (void)gpu;
    memory->total = 131072 * MIB;
    memory->used = 2 * MIB;
    memory->free = memory->total - memory->used;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t gpu, nvmlUtilization_t *rates)
{
    ENTER();
    rates->gpu = utilization(gpu);
    rates->memory = utilization(gpu) / 2;
    return NVML_SUCCESS;
}

GET_TWO(nvmlDeviceGetEncoderUtilization, 0, 167000)
GET_TWO(nvmlDeviceGetDecoderUtilization, swing(gpu) / 10, 167000)
GET_TWO(nvmlDeviceGetJpgUtilization, 0, 167000)
GET_TWO(nvmlDeviceGetOfaUtilization, 0, 167000)
/* Kinds: 0 graphics, 1 SM, 2 memory, 3 video. */
GET_OF(nvmlDeviceGetClockInfo, unsigned int, which == 2 ? 2619 : 1980 - 5 * swing(gpu))
GET_OF(nvmlDeviceGetMaxClockInfo, unsigned int, which == 2 ? 2619 : 1980)
GET(nvmlDeviceGetPerformanceState, unsigned int, 0)
GET(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, swing(gpu) > 80 ? 4 : 0)
GET(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, swing(gpu) > 80 ? 4 : 0)
GET(nvmlDeviceGetPowerUsage, unsigned int, milliwatts(gpu))
GET(nvmlDeviceGetEnforcedPowerLimit, unsigned int, 700000)
GET(nvmlDeviceGetPowerManagementLimit, unsigned int, 700000)
GET(nvmlDeviceGetPowerManagementDefaultLimit, unsigned int, 700000)
GET_TWO(nvmlDeviceGetPowerManagementLimitConstraints, 200000, 700000)
GET(nvmlDeviceGetTotalEnergyConsumption, unsigned long long, millijoules())
GET_OF(nvmlDeviceGetTemperature, unsigned int, 40 + swing(gpu) / 4)
GET_NONE(nvmlDeviceGetNumFans)
GET_NONE(nvmlDeviceGetFanSpeed)
GET_NONE(nvmlDeviceGetFanSpeed_v2)

nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t gpu, nvmlTemperature_t *told)
{
    ENTER();
    told->temperature = (int)(40 + swing(gpu) / 4);
    return told->sensorType == 0 ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetTemperatureThreshold(nvmlDevice_t gpu, unsigned int which, unsigned int *celsius)
{
    /* Shutdown, slowdown, of the memory, of the GPU; acoustic ones there are none. */
    static const unsigned int thresholds[] = {92, 90, 95, 87};
    ENTER();
    (void)gpu;
    if (which >= sizeof thresholds / sizeof thresholds[0])
        return NVML_ERROR_NOT_SUPPORTED;
    *celsius = thresholds[which];
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMarginTemperature(nvmlDevice_t gpu, nvmlMarginTemperature_t *told)
{
    ENTER();
    told->marginTemperature = (int)(47 - swing(gpu) / 4);
    return NVML_SUCCESS;
}

GET_OF(nvmlDeviceGetViolationStatus, nvmlViolationTime_t,
       ((nvmlViolationTime_t){now_us(), which == 0 ? now_us() / 1000 : 0}))

/* --- PCIe, NVLink, memory errors */

GET(nvmlDeviceGetCurrPcieLinkGeneration, unsigned int, 5)
GET(nvmlDeviceGetMaxPcieLinkGeneration, unsigned int, 5)
GET(nvmlDeviceGetGpuMaxPcieLinkGeneration, unsigned int, 5)
GET(nvmlDeviceGetCurrPcieLinkWidth, unsigned int, 16)
GET(nvmlDeviceGetMaxPcieLinkWidth, unsigned int, 16)
GET(nvmlDeviceGetPcieReplayCounter, unsigned int, gpu->index)
/* A real driver waits for 20 ms here. */
GET_OF(nvmlDeviceGetPcieThroughput, unsigned int, 1000 + 10 * swing(gpu))

#define GET_LINK(function, value) \
    nvmlReturn_t function(nvmlDevice_t gpu, unsigned int link, unsigned int *out) \
    { ENTER(); (void)gpu; *out = (value); \
      return link < link_count ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT; }
GET_LINK(nvmlDeviceGetNvLinkState, 1)
GET_LINK(nvmlDeviceGetNvLinkVersion, 7)
/* The first links lead to the GPU beside it, the others to NVSwitches. */
GET_LINK(nvmlDeviceGetNvLinkRemoteDeviceType,
         link < NEIGHBOUR_LINKS && (gpu->index ^ 1) < gpu_count ? 0 : 2)

nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t gpu, unsigned int link,
                                                 nvmlPciInfo_t *info)
{
    ENTER();
    if (link >= link_count)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (link >= NEIGHBOUR_LINKS || (gpu->index ^ 1) >= gpu_count)
        return NVML_ERROR_NOT_SUPPORTED;
    fill_pci(&gpus[gpu->index ^ 1], info);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkErrorCounter(nvmlDevice_t gpu, unsigned int link,
                                             unsigned int counter, unsigned long long *errors)
{
    ENTER();
    (void)gpu; (void)counter;
    *errors = 0;
    return link < link_count ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t gpu, unsigned int type, unsigned int counter,
                                         unsigned long long *errors)
{
    ENTER();
    *errors = type == 0 ? gpu->index + counter : 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t gpu, unsigned int *correctable,
                                       unsigned int *uncorrectable, unsigned int *pending,
                                       unsigned int *failed)
{
    ENTER();
    *correctable = gpu->index;
    *uncorrectable = *pending = *failed = 0;
    return NVML_SUCCESS;
}

GET(nvmlDeviceGetRowRemapperHistogram, nvmlRowRemapperHistogramValues_t,
    ((nvmlRowRemapperHistogramValues_t){639, 1, 0, 0, 0}))
/* Cards before Ampere retire pages. */
GET_NONE(nvmlDeviceGetRetiredPages)
GET_NONE(nvmlDeviceGetRetiredPages_v2)
GET_NONE(nvmlDeviceGetRetiredPagesPendingStatus)
