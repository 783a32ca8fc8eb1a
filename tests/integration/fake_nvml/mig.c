/* A library that conforms to NVML as far as partitions go: one GPU of seven slices, two profiles.
 *
 * How the GPU is partitioned lies in the file that FAKE_NVML_MIG names, as it lies in a card: whoever
 * loads the library later finds it. Structs are laid out as in nvml.h, and filled in only when their
 * version is the one of it; a place is taken from where the caller's pointer leads.
 */

#define _DEFAULT_SOURCE

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int nvmlReturn_t;

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
       INSUFFICIENT_SIZE = 7, IN_USE = 19, INSUFFICIENT_RESOURCES = 23,
       ARGUMENT_VERSION_MISMATCH = 25 };

typedef struct { unsigned int start, size; } placement_t;
typedef struct {
    unsigned int version, id, isP2pSupported, sliceCount, instanceCount, multiprocessorCount,
        copyEngineCount, decoderCount, encoderCount, jpegCount, ofaCount;
    unsigned long long memorySizeMB;
    char name[96];
} gpu_profile_t;
typedef struct {
    unsigned int version, id, sliceCount, instanceCount, multiprocessorCount,
        sharedCopyEngineCount, sharedDecoderCount, sharedEncoderCount, sharedJpegCount,
        sharedOfaCount;
    char name[96];
} compute_profile_t;
typedef struct {
    char busIdLegacy[16];
    unsigned int domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} pci_t;

enum { PLACES = 8, PARTS = 3, PROFILES = 18, COMPUTE_PROFILES = 9 };

struct part { int is_there; unsigned int id, profile, number; placement_t at; };
struct instance { int is_there; unsigned int id, profile; placement_t at; struct part parts[PARTS]; };
struct card { unsigned int mode, made; struct instance instances[PLACES]; };
/* A handle of the GPU has no part. */
struct device { struct instance *instance; struct part *part; };

typedef struct { struct device *device; unsigned int id, profileId; placement_t placement; } info_t;
typedef struct {
    struct device *device;
    struct instance *instance;
    unsigned int id, profileId;
    placement_t placement;
} compute_info_t;

static struct device gpu, devices[PLACES * PARTS];
static struct card *card;

#define ENTER() do { if (card == NULL) return UNINITIALIZED; } while (0)

nvmlReturn_t nvmlInitWithFlags(unsigned int flags)
{
    const char *path = getenv("FAKE_NVML_MIG");
    int file = path == NULL ? -1 : open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    void *found = MAP_FAILED;
    (void)flags;
    if (file >= 0 && ftruncate(file, sizeof *card) == 0)
        found = mmap(NULL, sizeof *card, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file >= 0)
        close(file);
    if (found == MAP_FAILED)
        return NOT_FOUND;
    card = found;
    return SUCCESS;
}

nvmlReturn_t nvmlShutdown(void)
{
    ENTER();
    munmap(card, sizeof *card);
    card = NULL;
    return SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t code)
{
    return code == IN_USE ? "In use by another client" : code == INSUFFICIENT_RESOURCES
        ? "Insufficient Resources" : "Some other error";
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count)
{
    ENTER();
    *count = 1;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, struct device **found)
{
    ENTER();
    *found = &gpu;
    return index == 0 ? SUCCESS : INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetUUID(struct device *device, char *uuid, unsigned int size)
{
    ENTER();
    if (size < 41)
        return INSUFFICIENT_SIZE;
    if (device == &gpu)
        strcpy(uuid, "GPU-f0f0f0f0-0000-4000-8000-000000000001");
    else
        sprintf(uuid, "MIG-f0f0f0f0-0000-4000-8000-%012x", device->part->number & 0xFFFF);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetName(struct device *device, char *name, unsigned int size)
{
    ENTER();
    (void)device;
    strncpy(name, "Foreign Accelerator 80G", size);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(struct device *device, pci_t *pci)
{
    ENTER();
    (void)device;
    memset(pci, 0, sizeof *pci);
    pci->pciDeviceId = 0x12345678;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(struct device *device, int *major, int *minor)
{
    ENTER();
    (void)device;
    *major = 8;
    *minor = 0;
    return SUCCESS;
}

/* --- mode */

nvmlReturn_t nvmlDeviceGetMigMode(struct device *device, unsigned int *now, unsigned int *pending)
{
    ENTER();
    (void)device;
    *now = *pending = card->mode;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceSetMigMode(struct device *device, unsigned int mode, nvmlReturn_t *became)
{
    ENTER();
    (void)device;
    card->mode = mode;
    *became = SUCCESS;
    return SUCCESS;
}

/* --- GPU instances: 1g at 0 to 6, and 3g at 0 and 4 */

static unsigned int size_of(unsigned int profile) { return profile == 9 ? 4 : 1; }

nvmlReturn_t nvmlDeviceGetGpuInstanceProfileInfoV(
    struct device *device, unsigned int constant, gpu_profile_t *info)
{
    ENTER();
    (void)device;
    if (constant >= PROFILES)
        return INVALID_ARGUMENT;
    if (info->version != (2U << 24 | sizeof *info))
        return ARGUMENT_VERSION_MISMATCH;
    if (constant != 0 && constant != 2)
        return NOT_SUPPORTED;
    info->id = constant == 2 ? 9 : 19;
    info->sliceCount = constant + 1;
    info->instanceCount = constant == 2 ? 2 : 7;
    info->multiprocessorCount = constant == 2 ? 42 : 14;
    info->copyEngineCount = info->sliceCount;
    info->isP2pSupported = info->decoderCount = info->encoderCount = 0;
    info->jpegCount = info->ofaCount = 0;
    info->memorySizeMB = constant == 2 ? 40192 : 9728;
    strcpy(info->name, constant == 2 ? "3g.40gb" : "1g.10gb");
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGpuInstancePossiblePlacements_v2(
    struct device *device, unsigned int profile, placement_t *places, unsigned int *count)
{
    unsigned int size = size_of(profile);
    ENTER();
    (void)device;
    *count = 0;
    for (unsigned int start = 0; start + size <= (size == 1 ? 7 : 8); start += size)
        places[(*count)++] = (placement_t){start, size};
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceCreateGpuInstanceWithPlacement(
    struct device *device, unsigned int profile, const placement_t *at, struct instance **made)
{
    ENTER();
    (void)device;
    if (!card->mode)
        return NOT_SUPPORTED;
    if (at->size != size_of(profile) || at->start % at->size || at->start + at->size > PLACES)
        return INVALID_ARGUMENT;
    for (int i = 0; i < PLACES; i++) {
        const struct instance *each = &card->instances[i];
        if (each->is_there && at->start < each->at.start + each->at.size
            && each->at.start < at->start + at->size)
            return INSUFFICIENT_RESOURCES;
    }
    *made = &card->instances[at->start];
    **made = (struct instance){1, (at->size == 1 ? 7 : 1) + at->start / at->size, profile, *at,
                               {{0, 0, 0, 0, {0, 0}}}};
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGpuInstances(
    struct device *device, unsigned int profile, struct instance **found, unsigned int *count)
{
    ENTER();
    (void)device;
    *count = 0;
    for (int i = 0; i < PLACES; i++)
        if (card->instances[i].is_there && card->instances[i].profile == profile)
            found[(*count)++] = &card->instances[i];
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGpuInstanceById(
    struct device *device, unsigned int id, struct instance **found)
{
    ENTER();
    (void)device;
    for (int i = 0; i < PLACES; i++)
        if (card->instances[i].is_there && card->instances[i].id == id) {
            *found = &card->instances[i];
            return SUCCESS;
        }
    return NOT_FOUND;
}

nvmlReturn_t nvmlGpuInstanceGetInfo(struct instance *instance, info_t *info)
{
    ENTER();
    *info = (info_t){&gpu, instance->id, instance->profile, instance->at};
    return SUCCESS;
}

nvmlReturn_t nvmlGpuInstanceDestroy(struct instance *instance)
{
    ENTER();
    for (int i = 0; i < PARTS; i++)
        if (instance->parts[i].is_there)
            return IN_USE;
    instance->is_there = 0;
    return SUCCESS;
}

/* --- compute instances: of one slice, and of three in a 3g; the profile ID is the constant */

nvmlReturn_t nvmlGpuInstanceGetComputeInstanceProfileInfoV(
    struct instance *instance, unsigned int constant, unsigned int engines, compute_profile_t *info)
{
    ENTER();
    if (constant >= COMPUTE_PROFILES || engines != 0)
        return INVALID_ARGUMENT;
    if (info->version != (2U << 24 | sizeof *info))
        return ARGUMENT_VERSION_MISMATCH;
    if (constant != 0 && (constant != 2 || instance->profile != 9))
        return NOT_SUPPORTED;
    info->id = constant;
    info->sliceCount = constant + 1;
    info->instanceCount = instance->profile == 9 && constant == 0 ? 3 : 1;
    info->multiprocessorCount = 14 * info->sliceCount;
    return SUCCESS;
}

nvmlReturn_t nvmlGpuInstanceCreateComputeInstance(
    struct instance *instance, unsigned int profile, struct part **made)
{
    unsigned int size = profile + 1, slices = instance->profile == 9 ? 3 : 1;
    ENTER();
    for (unsigned int start = 0; start + size <= slices; start++) {
        int is_free = 1;
        for (unsigned int i = 0; i < PARTS; i++) {
            const struct part *each = &instance->parts[i];
            if (each->is_there && start < each->at.start + each->at.size
                && each->at.start < start + size)
                is_free = 0;
        }
        if (is_free) {
            *made = &instance->parts[start];
            **made = (struct part){1, start, profile, ++card->made, {start, size}};
            return SUCCESS;
        }
    }
    return INSUFFICIENT_RESOURCES;
}

nvmlReturn_t nvmlGpuInstanceGetComputeInstances(
    struct instance *instance, unsigned int profile, struct part **found, unsigned int *count)
{
    ENTER();
    *count = 0;
    for (int i = 0; i < PARTS; i++)
        if (instance->parts[i].is_there && instance->parts[i].profile == profile)
            found[(*count)++] = &instance->parts[i];
    return SUCCESS;
}

nvmlReturn_t nvmlGpuInstanceGetComputeInstanceById(
    struct instance *instance, unsigned int id, struct part **found)
{
    ENTER();
    *found = &instance->parts[id % PARTS];
    return id < PARTS && (*found)->is_there ? SUCCESS : NOT_FOUND;
}

nvmlReturn_t nvmlComputeInstanceGetInfo_v2(struct part *part, compute_info_t *info)
{
    ENTER();
    *info = (compute_info_t){&gpu, NULL, part->id, part->profile, part->at};
    return SUCCESS;
}

nvmlReturn_t nvmlComputeInstanceDestroy(struct part *part)
{
    ENTER();
    part->is_there = 0;
    return SUCCESS;
}

/* --- MIG devices */

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(struct device *device, unsigned int *count)
{
    ENTER();
    (void)device;
    *count = card->mode ? 7 : 0;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(
    struct device *device, unsigned int index, struct device **found)
{
    ENTER();
    (void)device;
    for (int i = 0; i < PLACES * PARTS; i++) {
        struct instance *instance = &card->instances[i / PARTS];
        struct part *part = &instance->parts[i % PARTS];
        if (instance->is_there && part->is_there && index-- == 0) {
            devices[i] = (struct device){instance, part};
            *found = &devices[i];
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetGpuInstanceId(struct device *device, unsigned int *id)
{
    ENTER();
    *id = device->instance->id;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeInstanceId(struct device *device, unsigned int *id)
{
    ENTER();
    *id = device->part->id;
    return SUCCESS;
}
