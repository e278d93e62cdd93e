/* libcudart of the stand-in: CUDA's runtime on host memory. It allocates, counts, refuses, and computes nothing.
 *
 * ABI: CUDA 13.0, x86-64, as declared in driver_types.h and cuda_runtime_api.h of that release; structures are
 * written at the offsets that its compiler gives them. Functions of the provider that are missing here are
 * found by the build (tests/cuda/libraries.py).
 *
 * True to CUDA: error codes; what a capture forbids, by mode and thread ("Prohibited and Unhandled Operations" in
 * the CUDA C++ Programming Guide, cudaThreadExchangeStreamCaptureMode in the API's reference); a current device
 * per thread; 2 MiB blocks; freed memory is invalid; a graph does its copies when it is launched.
 *
 * Not there: kernels' results; time; waiting (whatever is enqueued has happened at once); the memory of the
 * context, of loaded kernels and of instantiated graphs; forked captures that were never joined.
 * A copy to the device of more than `stand_in_set_copied` bytes moves nothing, so that weights cost no memory:
 * the device's memory is zeros there. */

#define _GNU_SOURCE
#include "stand_in.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef struct {
    unsigned x, y, z;
} dim3;

enum error {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    MEMORY_ALLOCATION = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_RESOURCE_HANDLE = 400,
    ILLEGAL_STATE = 401,
    SYMBOL_NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

enum { TO_HOST_FROM_HOST = 0, TO_DEVICE = 1, TO_HOST = 2, ON_DEVICE = 3, BY_ADDRESS = 4 }; /* cudaMemcpyKind */
enum { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };                       /* cudaStreamCaptureMode */
enum { STREAM_NON_BLOCKING = 1 };
#define LEGACY ((void *)1)     /* cudaStreamLegacy; NULL is the same stream */
#define PER_THREAD ((void *)2) /* cudaStreamPerThread */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static void unlock(int *unused) {
    (void)unused;
    pthread_mutex_unlock(&mutex);
}
#define LOCK __attribute__((cleanup(unlock), unused)) int locked_ = pthread_mutex_lock(&mutex)

static __thread int last_error;
static __thread int current_device;
static int sticky_error;
static int device_count = 1;
static size_t total_memory = (size_t)80 << 30;
static size_t copied_bytes = (size_t)4 << 20;

static int fail(int error) {
    if (error)
        last_error = error;
    return error;
}

/* ── counters ─────────────────────────────────────────────────────────────────────────────────────────── */

static struct counter *counters;

static void list_counter(struct counter *counter) {
    if (!counter->listed) {
        counter->listed = 1;
        counter->next = counters;
        counters = counter;
    }
}

static void add(const char *kind, const char *name, long number) {
    struct counter *counter = counters;
    while (counter && (strcmp(counter->kind, kind) || strcmp(counter->name, name)))
        counter = counter->next;
    if (!counter) {
        counter = calloc(1, sizeof *counter);
        counter->kind = strdup(kind);
        counter->name = strdup(name);
        list_counter(counter);
    }
    counter->number += number;
}

void stand_in_add(const char *kind, const char *name, long number) {
    LOCK;
    add(kind, name, number);
}

static struct injection {
    char name[96];
    long calls;
    int error, sticky;
    struct injection *next;
} *injections;

/* The `nth` call of a function from now on answers `error`; with `sticky` all later calls of any do. */
void stand_in_fail(const char *name, long nth, int error, int sticky) {
    LOCK;
    struct injection *made = calloc(1, sizeof *made);
    snprintf(made->name, sizeof made->name, "%s", name);
    made->calls = nth;
    made->error = error;
    made->sticky = sticky;
    made->next = injections;
    injections = made;
}

/* No failure is left to come, and the context is whole again, which CUDA's never is. */
void stand_in_mend(void) {
    LOCK;
    while (injections) {
        struct injection *gone = injections;
        injections = gone->next;
        free(gone);
    }
    sticky_error = 0;
}

static int enter(struct counter *call) {
    list_counter(call);
    call->number++;
    if (sticky_error)
        return fail(sticky_error);
    for (struct injection *item = injections; item; item = item->next)
        if (!strcmp(item->name, call->name) && !--item->calls) {
            sticky_error = item->sticky ? item->error : 0;
            return fail(item->error);
        }
    return SUCCESS;
}

int stand_in_enter(struct counter *call) {
    LOCK;
    return enter(call);
}

/* Inside this file a call holds the lock until it returns. */
#define BEGIN                                                                                                \
    static struct counter call_ = {"call", __func__, 0, NULL, 0};                                            \
    LOCK;                                                                                                    \
    int refused_ = enter(&call_);                                                                            \
    if (refused_)                                                                                            \
        return refused_

void stand_in_set_devices(int number) { device_count = number; }
void stand_in_set_total(size_t bytes) { total_memory = bytes; }
void stand_in_set_copied(size_t bytes) { copied_bytes = bytes; }

/* ── captures ─────────────────────────────────────────────────────────────────────────────────────────── */

struct node {
    enum { KERNEL, COPY, SET } what;
    void *to;
    const void *from;
    size_t bytes, to_pitch, from_pitch, rows;
    int value;
};
struct nodes {
    struct node *items;
    size_t used, room;
    long kernels;
};

struct capture {
    int mode, broken;
    pthread_t thread;
    struct stream *origin;
    struct nodes nodes;
    struct capture *next;
};
struct stream {
    int device, flags;
    struct capture *capture;
    struct stream *next;
};
struct event {
    int recorded;
    struct capture *capture; /* only compared, never followed: the capture may be over */
    double milliseconds;
    struct event *next;
};

static struct capture *captures;
static struct stream *streams;
static struct event *events;

static int is_recorded(struct capture *capture) {
    return capture->mode == GLOBAL ||
           (capture->mode == THREAD_LOCAL && pthread_equal(capture->thread, pthread_self()));
}

static int breaks(struct capture *capture, const char *name, int error) {
    capture->broken = 1;
    add("forbidden", name, 1);
    return fail(error);
}

/* A call that may be unsafe in a capture ("potentially unsafe API call"). */
static int forbidden(const char *name) {
    for (struct capture *capture = captures; capture; capture = capture->next)
        if (is_recorded(capture))
            return breaks(capture, name, CAPTURE_UNSUPPORTED);
    return SUCCESS;
}

/* A call that waits for the whole device: also for streams that other threads capture. */
static int waits_for_all(const char *name) { return captures ? breaks(captures, name, CAPTURE_UNSUPPORTED) : 0; }

int stand_in_forbidden(const char *name) {
    LOCK;
    return forbidden(name);
}

static int capturing(void) {
    for (struct capture *capture = captures; capture; capture = capture->next)
        if (is_recorded(capture))
            return 1;
    return 0;
}

int stand_in_capturing(void) {
    LOCK;
    return capturing();
}

static int is_legacy(void *handle) { return !handle || handle == LEGACY; }

/* The stream of a handle, NULL for the default ones; or an error. */
static int find_stream(void *handle, const char *name, struct stream **found) {
    *found = NULL;
    if (is_legacy(handle)) {
        for (struct capture *capture = captures; capture; capture = capture->next)
            if (!(capture->origin->flags & STREAM_NON_BLOCKING))
                return breaks(capture, name, CAPTURE_IMPLICIT);
        return SUCCESS;
    }
    if (handle == PER_THREAD)
        return SUCCESS;
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream == handle) {
            *found = stream;
            return stream->capture && stream->capture->broken ? fail(CAPTURE_INVALIDATED) : SUCCESS;
        }
    return fail(INVALID_RESOURCE_HANDLE);
}

static void record(struct capture *capture, struct node node) {
    struct nodes *nodes = &capture->nodes;
    if (nodes->used == nodes->room) {
        nodes->room = nodes->room ? 2 * nodes->room : 64;
        nodes->items = realloc(nodes->items, nodes->room * sizeof node);
    }
    nodes->kernels += node.what == KERNEL;
    nodes->items[nodes->used++] = node;
}

/* ── devices and errors ───────────────────────────────────────────────────────────────────────────────── */

int cudaGetDeviceCount(int *count) {
    BEGIN;
    *count = device_count;
    return device_count ? SUCCESS : fail(NO_DEVICE);
}

int cudaGetDevice(int *device) {
    BEGIN;
    *device = current_device;
    return SUCCESS;
}

int cudaSetDevice(int device) {
    BEGIN;
    if (device < 0 || device >= device_count)
        return fail(INVALID_DEVICE);
    current_device = device;
    return SUCCESS;
}

int cudaDriverGetVersion(int *version) {
    BEGIN;
    *version = 13000;
    return SUCCESS;
}

int cudaRuntimeGetVersion(int *version) {
    BEGIN;
    *version = 13000;
    return SUCCESS;
}

/* cudaDeviceProp has 1008 bytes in CUDA 13.0. An H100's numbers. */
int cudaGetDeviceProperties(char *properties, int device) {
    BEGIN;
    if (device < 0 || device >= device_count)
        return fail(INVALID_DEVICE);
    memset(properties, 0, 1008);
    strcpy(properties, "Stand-in");
    for (int i = 0; i < 16; i++)
        properties[256 + i] = (char)(i + 16 * device); /* uuid */
#define SIZE(offset, value) *(size_t *)(properties + (offset)) = (value)
#define INT(offset, value) *(int *)(properties + (offset)) = (value)
    SIZE(288, total_memory);
    SIZE(296, 49152); /* sharedMemPerBlock */
    INT(304, 65536);  /* regsPerBlock */
    INT(308, 32);     /* warpSize */
    SIZE(312, 2147483647);
    INT(320, 1024); /* maxThreadsPerBlock, maxThreadsDim, maxGridSize */
    INT(324, 1024), INT(328, 1024), INT(332, 64);
    INT(336, 2147483647), INT(340, 65535), INT(344, 65535);
    SIZE(352, 65536); /* totalConstMem */
    INT(360, 9), INT(364, 0);
    SIZE(368, 512);     /* textureAlignment */
    INT(384, 132);      /* multiProcessorCount; integrated, at 388, is 0 */
    INT(596, 50 << 20); /* l2CacheSize */
    INT(604, 2048);     /* maxThreadsPerMultiProcessor */
    SIZE(624, 233472);  /* sharedMemPerMultiprocessor */
    INT(632, 65536);    /* regsPerMultiprocessor */
    INT(668, 1);        /* cooperativeLaunch */
    SIZE(672, 232448);  /* sharedMemPerBlockOptin */
    return SUCCESS;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    BEGIN;
    (void)device;
    switch (attribute) {
    case 1: *value = 1024; break;                  /* maxThreadsPerBlock */
    case 8: *value = 49152; break;                 /* maxSharedMemoryPerBlock */
    case 10: *value = 32; break;                   /* warpSize */
    case 12: case 82: *value = 65536; break;       /* registers per block, per multiprocessor */
    case 16: *value = 132; break;                  /* multiProcessorCount */
    case 38: *value = 50 << 20; break;             /* l2CacheSize */
    case 39: *value = 2048; break;                 /* maxThreadsPerMultiProcessor */
    case 75: *value = 9; break;                    /* computeCapabilityMajor */
    case 18: case 76: *value = 0; break;           /* integrated, computeCapabilityMinor */
    case 81: *value = 233472; break;               /* maxSharedMemoryPerMultiprocessor */
    case 97: *value = 232448; break;               /* maxSharedMemoryPerBlockOptin */
    default: *value = 1;
    }
    return SUCCESS;
}

static const char *name_of(int error) {
    switch (error) {
    case SUCCESS: return "cudaSuccess";
    case INVALID_VALUE: return "cudaErrorInvalidValue";
    case MEMORY_ALLOCATION: return "cudaErrorMemoryAllocation";
    case NO_DEVICE: return "cudaErrorNoDevice";
    case INVALID_DEVICE: return "cudaErrorInvalidDevice";
    case INVALID_RESOURCE_HANDLE: return "cudaErrorInvalidResourceHandle";
    case ILLEGAL_STATE: return "cudaErrorIllegalState";
    case SYMBOL_NOT_FOUND: return "cudaErrorSymbolNotFound";
    case ILLEGAL_ADDRESS: return "cudaErrorIllegalAddress";
    case CAPTURE_UNSUPPORTED: return "cudaErrorStreamCaptureUnsupported";
    case CAPTURE_INVALIDATED: return "cudaErrorStreamCaptureInvalidated";
    case CAPTURE_MERGE: return "cudaErrorStreamCaptureMerge";
    case CAPTURE_UNMATCHED: return "cudaErrorStreamCaptureUnmatched";
    case CAPTURE_ISOLATION: return "cudaErrorStreamCaptureIsolation";
    case CAPTURE_IMPLICIT: return "cudaErrorStreamCaptureImplicit";
    case CAPTURED_EVENT: return "cudaErrorCapturedEvent";
    case CAPTURE_WRONG_THREAD: return "cudaErrorStreamCaptureWrongThread";
    default: return "cudaErrorUnknown";
    }
}

const char *cudaGetErrorName(int error) { return name_of(error); }
/* Texts that our errors are sorted by. */
const char *cudaGetErrorString(int error) {
    switch (error) {
    case SUCCESS: return "no error";
    case MEMORY_ALLOCATION: return "out of memory";
    case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
    case CAPTURE_INVALIDATED: return "operation failed due to a previous error during capture";
    default: return "refused by the stand-in";
    }
}

int cudaGetLastError(void) {
    int error = last_error;
    last_error = sticky_error;
    return error;
}

int cudaPeekAtLastError(void) { return last_error; }

/* Functions of the driver: there are none. */
int cudaGetDriverEntryPointByVersion(const char *symbol, void **entry, unsigned version, unsigned long long flags,
                                     int *status) {
    BEGIN;
    (void)symbol, (void)version, (void)flags;
    *entry = NULL;
    if (status)
        *status = 1; /* cudaDriverEntryPointSymbolNotFound */
    return SUCCESS;
}

/* ── memory ───────────────────────────────────────────────────────────────────────────────────────────── */

#define PAGE ((size_t)2 << 20) /* what the driver maps at a time; smaller blocks share one */
#define UNIT ((size_t)512)
#define UNITS (PAGE / UNIT)

struct slab {
    char *start;
    unsigned char taken[UNITS];
    size_t used;
    struct slab *next;
};
struct block {
    char *start;
    size_t bytes, mapped; /* mapped: of its own, 0 if it lies in a slab */
    struct slab *slab;
    struct block *next;
};
static struct slab *slabs;
static struct block *blocks;
static struct block *locked; /* page-locked memory of the host */
static size_t used_memory;

static size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

static char *map_pages(size_t bytes) {
    char *start = mmap(NULL, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    char *aligned = (char *)rounded((size_t)start, PAGE);
    if (aligned > start)
        munmap(start, (size_t)(aligned - start));
    munmap(aligned + bytes, (size_t)(start + PAGE - aligned));
    return aligned;
}

static struct slab *slab_with(size_t units, size_t *first) {
    for (struct slab *slab = slabs; slab; slab = slab->next)
        for (size_t at = 0, run = 0; at < UNITS; at++) {
            run = slab->taken[at] ? 0 : run + 1;
            if (run == units) {
                *first = at + 1 - units;
                return slab;
            }
        }
    if (used_memory + PAGE > total_memory)
        return NULL;
    struct slab *slab = calloc(1, sizeof *slab);
    slab->start = map_pages(PAGE);
    slab->next = slabs;
    slabs = slab;
    used_memory += PAGE;
    *first = 0;
    return slab;
}

static int allocate(void **address, size_t bytes) {
    struct block *block = calloc(1, sizeof *block);
    size_t first = 0, units = rounded(bytes, UNIT) / UNIT;
    *address = NULL;
    if (bytes < PAGE / 2) {
        block->slab = slab_with(units, &first);
        if (block->slab) {
            block->start = block->slab->start + first * UNIT;
            block->slab->used += units;
            memset(block->slab->taken + first, 1, units);
        }
    } else if (used_memory + rounded(bytes, PAGE) <= total_memory) {
        block->mapped = rounded(bytes, PAGE);
        block->start = map_pages(block->mapped);
        used_memory += block->start ? block->mapped : 0;
    }
    if (!block->start) {
        free(block);
        return fail(MEMORY_ALLOCATION);
    }
    block->bytes = bytes;
    block->next = blocks;
    blocks = block;
    *address = block->start;
    add("open", "device memory", 1);
    return SUCCESS;
}

static void release_slab(struct slab *gone) {
    struct slab **link = &slabs;
    while (*link != gone)
        link = &(*link)->next;
    *link = gone->next;
    munmap(gone->start, PAGE);
    used_memory -= PAGE;
    free(gone);
}

static int release(void *address) {
    if (!address)
        return SUCCESS;
    struct block **link = &blocks;
    while (*link && (*link)->start != address)
        link = &(*link)->next;
    struct block *gone = *link;
    if (!gone)
        return fail(INVALID_VALUE);
    *link = gone->next;
    if (gone->mapped) {
        munmap(gone->start, gone->mapped);
        used_memory -= gone->mapped;
    } else {
        size_t units = rounded(gone->bytes, UNIT) / UNIT;
        memset(gone->slab->taken + (size_t)(gone->start - gone->slab->start) / UNIT, 0, units);
        memset(gone->start, 0, units * UNIT);
        gone->slab->used -= units;
        if (!gone->slab->used)
            release_slab(gone->slab);
    }
    free(gone);
    add("open", "device memory", -1);
    return SUCCESS;
}

static struct block *block_of(struct block *list, const void *address, size_t bytes) {
    const char *start = address;
    for (; list; list = list->next)
        if (list->start <= start && start + bytes <= list->start + list->bytes)
            return list;
    return NULL;
}

int cudaMalloc(void **address, size_t bytes) {
    BEGIN;
    if (!bytes) {
        *address = NULL;
        return SUCCESS;
    }
    int error = forbidden("cudaMalloc");
    return error ? error : allocate(address, bytes);
}

int cudaFree(void *address) {
    BEGIN;
    int error = forbidden("cudaFree");
    return error ? error : release(address);
}

int cudaMallocFromPoolAsync(void **address, size_t bytes, void *pool, void *stream) {
    BEGIN;
    (void)pool, (void)stream;
    int error = forbidden("cudaMallocFromPoolAsync");
    return error ? error : allocate(address, bytes);
}

int cudaFreeAsync(void *address, void *stream) {
    BEGIN;
    (void)stream;
    int error = forbidden("cudaFreeAsync");
    return error ? error : release(address);
}

static int lock_memory(void **address, size_t bytes, const char *name) {
    int error = forbidden(name);
    if (error)
        return error;
    struct block *block = calloc(1, sizeof *block);
    block->bytes = bytes;
    block->start = aligned_alloc(4096, rounded(bytes ? bytes : 1, 4096));
    block->next = locked;
    locked = block;
    *address = block->start;
    add("open", "page-locked memory", 1);
    return SUCCESS;
}

int cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    BEGIN;
    (void)flags;
    return lock_memory(address, bytes, "cudaHostAlloc");
}

int cudaMallocHost(void **address, size_t bytes) {
    BEGIN;
    return lock_memory(address, bytes, "cudaMallocHost");
}

int cudaFreeHost(void *address) {
    BEGIN;
    int error = forbidden("cudaFreeHost");
    if (error || !address)
        return error;
    struct block **link = &locked;
    while (*link && (*link)->start != address)
        link = &(*link)->next;
    struct block *gone = *link;
    if (!gone)
        return fail(INVALID_VALUE);
    *link = gone->next;
    free(gone->start);
    free(gone);
    add("open", "page-locked memory", -1);
    return SUCCESS;
}

int cudaMemGetInfo(size_t *available, size_t *total) {
    BEGIN;
    *available = total_memory - used_memory;
    *total = total_memory;
    return SUCCESS;
}

/* cudaPointerAttributes: type, device, device address, host address, reserved. */
int cudaPointerGetAttributes(char *attributes, const void *address) {
    BEGIN;
    int on_device = block_of(blocks, address, 1) != NULL, on_host = block_of(locked, address, 1) != NULL;
    memset(attributes, 0, 24);
    *(int *)attributes = on_device ? 2 : on_host ? 1 : 0;
    *(const void **)(attributes + 8) = on_device || on_host ? address : NULL;
    *(const void **)(attributes + 16) = on_host ? address : NULL;
    return SUCCESS;
}

int cudaMemPoolCreate(void **pool, const void *properties) {
    BEGIN;
    (void)properties;
    *pool = malloc(1);
    add("open", "memory pool", 1);
    return SUCCESS;
}
int cudaMemPoolDestroy(void *pool) {
    BEGIN;
    free(pool);
    add("open", "memory pool", -1);
    return SUCCESS;
}
int cudaMemPoolGetAttribute(void *pool, int attribute, unsigned long long *value) {
    BEGIN;
    (void)pool, (void)attribute;
    *value = 0;
    return SUCCESS;
}
int cudaMemPoolSetAttribute(void *pool, int attribute, void *value) {
    BEGIN;
    (void)pool, (void)attribute, (void)value;
    return SUCCESS;
}
int cudaMemPoolTrimTo(void *pool, size_t bytes) {
    BEGIN;
    (void)pool, (void)bytes;
    return SUCCESS;
}

/* ── copies ───────────────────────────────────────────────────────────────────────────────────────────── */

static int valid(const struct node *node) {
    size_t rows = node->rows - 1;
    return (!node->to || block_of(blocks, node->to, rows * node->to_pitch + node->bytes)) &&
           (!node->from || block_of(blocks, node->from, rows * node->from_pitch + node->bytes));
}

static void carry_out(const struct node *node, int kind) {
    for (size_t row = 0; row < node->rows; row++) {
        char *to = (char *)node->to + row * node->to_pitch;
        if (node->what == SET && !node->value && node->bytes >= PAGE && !((size_t)to % PAGE))
            madvise(to, rounded(node->bytes, 4096), MADV_DONTNEED); /* zeros without taking memory */
        else if (node->what == SET)
            memset(to, node->value, node->bytes);
        else if (kind == TO_HOST || node->bytes <= copied_bytes)
            memmove(to, (const char *)node->from + row * node->from_pitch, node->bytes);
    }
}

static const char *const KINDS[] = {"copies on the host", "copies to the device", "copies to the host",
                                    "copies on the device"};

static int kind_of(const void *to, const void *from, int kind) {
    if (kind != BY_ADDRESS)
        return kind;
    return (block_of(blocks, to, 1) ? TO_DEVICE : 0) | (block_of(blocks, from, 1) ? TO_HOST : 0);
}

/* `waits`: the call returns when it is done, and takes the legacy stream. */
static int copy(struct node node, int kind, void *handle, int waits, const char *name) {
    struct stream *stream;
    int error = find_stream(handle, name, &stream);
    if (error || (waits && (error = forbidden(name))))
        return error;
    if (!node.bytes || !node.rows)
        return SUCCESS;
    if (kind < 0 || kind > BY_ADDRESS)
        return fail(INVALID_VALUE);
    kind = kind_of(node.to, node.from, kind);
    struct node devices = node;
    const void *host = kind == TO_DEVICE ? node.from : kind == TO_HOST ? node.to : NULL;
    devices.from = kind & TO_HOST ? node.from : NULL; /* bit 1: from the device; bit 0: to the device */
    devices.to = kind & TO_DEVICE ? node.to : NULL;
    if (!valid(&devices))
        return fail(INVALID_VALUE);
    if (waits)
        add("count", "waits", 1);
    if (stream && stream->capture) {
        if (host && !block_of(locked, host, node.bytes))
            return breaks(stream->capture, "a copy from or to pageable memory", CAPTURE_UNSUPPORTED);
        add("captured", KINDS[kind], 1);
        record(stream->capture, node);
        return SUCCESS;
    }
    add("count", KINDS[kind], 1);
    carry_out(&node, kind);
    return SUCCESS;
}

int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    BEGIN;
    return copy((struct node){COPY, to, from, bytes, 0, 0, 1, 0}, kind, LEGACY, 1, "cudaMemcpy");
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    BEGIN;
    return copy((struct node){COPY, to, from, bytes, 0, 0, 1, 0}, kind, stream, 0, "cudaMemcpyAsync");
}

int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t pitch, size_t width, size_t height,
                      int kind, void *stream) {
    BEGIN;
    if (width > to_pitch || width > pitch)
        return fail(12); /* cudaErrorInvalidPitchValue */
    struct node node = {COPY, to, from, width, to_pitch, pitch, height, 0};
    return copy(node, kind, stream, 0, "cudaMemcpy2DAsync");
}

int cudaMemcpyFromSymbol(void *to, const void *symbol, size_t bytes, size_t offset, int kind) {
    BEGIN;
    (void)symbol, (void)offset, (void)kind;
    int error = forbidden("cudaMemcpyFromSymbol");
    if (error)
        return error;
    add("count", KINDS[TO_HOST], 1);
    add("count", "waits", 1);
    memset(to, 0, bytes);
    return SUCCESS;
}

static int set(void *to, int value, size_t bytes, void *handle, const char *name) {
    struct stream *stream;
    struct node node = {SET, to, NULL, bytes, 0, 0, 1, value};
    int error = find_stream(handle, name, &stream);
    if (error || !bytes)
        return error;
    if (!valid(&node))
        return fail(INVALID_VALUE);
    if (stream && stream->capture)
        record(stream->capture, node);
    else
        carry_out(&node, ON_DEVICE);
    return SUCCESS;
}

int cudaMemset(void *to, int value, size_t bytes) {
    BEGIN;
    int error = forbidden("cudaMemset");
    return error ? error : set(to, value, bytes, LEGACY, "cudaMemset");
}

int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
    BEGIN;
    return set(to, value, bytes, stream, "cudaMemsetAsync");
}

/* ── streams and events ───────────────────────────────────────────────────────────────────────────────── */

static int make_stream(void **handle, unsigned flags) {
    struct stream *stream = calloc(1, sizeof *stream);
    stream->device = current_device;
    stream->flags = (int)flags;
    stream->next = streams;
    streams = *handle = stream;
    add("open", "stream", 1);
    return SUCCESS;
}

int cudaStreamCreate(void **stream) {
    BEGIN;
    return make_stream(stream, 0);
}

int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    BEGIN;
    return make_stream(stream, flags);
}

int cudaStreamDestroy(void *handle) {
    BEGIN;
    struct stream **link = &streams;
    while (*link && *link != handle)
        link = &(*link)->next;
    struct stream *gone = *link;
    if (!gone)
        return fail(INVALID_RESOURCE_HANDLE);
    if (gone->capture)
        return breaks(gone->capture, "cudaStreamDestroy", CAPTURE_UNSUPPORTED);
    *link = gone->next;
    free(gone);
    add("open", "stream", -1);
    return SUCCESS;
}

int cudaStreamSynchronize(void *handle) {
    BEGIN;
    struct stream *stream;
    int error = find_stream(handle, "cudaStreamSynchronize", &stream);
    if (error)
        return error;
    if (stream && stream->capture)
        return breaks(stream->capture, "cudaStreamSynchronize", CAPTURE_UNSUPPORTED);
    if ((error = forbidden("cudaStreamSynchronize")))
        return error;
    add("count", "waits", 1);
    return SUCCESS;
}

int cudaDeviceSynchronize(void) {
    BEGIN;
    int error = waits_for_all("cudaDeviceSynchronize");
    if (!error)
        add("count", "waits", 1);
    return error;
}

static struct event *find_event(void *handle) {
    struct event *event = events;
    while (event && event != handle)
        event = event->next;
    return event;
}

static int make_event(void **handle) {
    struct event *event = calloc(1, sizeof *event);
    event->next = events;
    events = *handle = event;
    add("open", "event", 1);
    return SUCCESS;
}

int cudaEventCreate(void **event) {
    BEGIN;
    return make_event(event);
}

int cudaEventCreateWithFlags(void **event, unsigned flags) {
    BEGIN;
    (void)flags;
    return make_event(event);
}

int cudaEventDestroy(void *handle) {
    BEGIN;
    struct event **link = &events;
    while (*link && *link != handle)
        link = &(*link)->next;
    struct event *gone = *link;
    if (!gone)
        return fail(INVALID_RESOURCE_HANDLE);
    *link = gone->next;
    free(gone);
    add("open", "event", -1);
    return SUCCESS;
}

static int record_event(void *handle, void *stream_handle) {
    struct stream *stream;
    struct event *event = find_event(handle);
    int error = find_stream(stream_handle, "cudaEventRecord", &stream);
    if (error || !event)
        return error ? error : fail(INVALID_RESOURCE_HANDLE);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->recorded = 1;
    event->capture = stream ? stream->capture : NULL;
    event->milliseconds = (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
    return SUCCESS;
}

int cudaEventRecord(void *event, void *stream) {
    BEGIN;
    return record_event(event, stream);
}

int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) {
    BEGIN;
    (void)flags;
    return record_event(event, stream);
}

int cudaEventSynchronize(void *handle) {
    BEGIN;
    struct event *event = find_event(handle);
    if (!event)
        return fail(INVALID_RESOURCE_HANDLE);
    for (struct capture *capture = captures; capture; capture = capture->next)
        if (event->capture == capture)
            return breaks(capture, "cudaEventSynchronize", CAPTURED_EVENT);
    int error = forbidden("cudaEventSynchronize");
    if (!error)
        add("count", "waits", 1);
    return error;
}

int cudaEventElapsedTime(float *milliseconds, void *start, void *end) {
    BEGIN;
    struct event *began = find_event(start), *ended = find_event(end);
    if (!began || !ended || !began->recorded || !ended->recorded)
        return fail(INVALID_RESOURCE_HANDLE);
    *milliseconds = (float)(ended->milliseconds - began->milliseconds);
    return SUCCESS;
}

/* An event of a capture draws the stream into it. */
int cudaStreamWaitEvent(void *handle, void *event_handle, unsigned flags) {
    BEGIN;
    (void)flags;
    struct stream *stream;
    struct event *event = find_event(event_handle);
    int error = find_stream(handle, "cudaStreamWaitEvent", &stream);
    if (error || !event)
        return error ? error : fail(INVALID_RESOURCE_HANDLE);
    struct capture *mine = stream ? stream->capture : NULL, *its = event->capture;
    if (mine == its)
        return SUCCESS;
    if (mine)
        return breaks(mine, "cudaStreamWaitEvent", its ? CAPTURE_MERGE : CAPTURE_ISOLATION);
    if (!stream)
        return breaks(its, "cudaStreamWaitEvent", CAPTURE_IMPLICIT);
    stream->capture = its;
    return SUCCESS;
}

/* ── graphs ───────────────────────────────────────────────────────────────────────────────────────────── */

struct graph {
    struct nodes nodes;
    struct graph *next;
};
static struct graph *graphs, *executables;

int cudaStreamIsCapturing(void *handle, int *status) {
    BEGIN;
    struct stream *stream;
    int error = find_stream(handle, "cudaStreamIsCapturing", &stream);
    *status = stream && stream->capture ? 1 + stream->capture->broken : 0;
    return error == CAPTURE_INVALIDATED ? SUCCESS : error;
}

int cudaStreamBeginCapture(void *handle, int mode) {
    BEGIN;
    struct stream *stream;
    if (is_legacy(handle) || handle == PER_THREAD) {
        add("forbidden", "cudaStreamBeginCapture of a default stream", 1);
        return fail(CAPTURE_UNSUPPORTED);
    }
    int error = find_stream(handle, "cudaStreamBeginCapture", &stream);
    if (stream && stream->capture)
        return breaks(stream->capture, "cudaStreamBeginCapture in a capture", ILLEGAL_STATE);
    if (error || mode < GLOBAL || mode > RELAXED)
        return error ? error : fail(INVALID_VALUE);
    struct capture *capture = calloc(1, sizeof *capture);
    capture->mode = mode;
    capture->thread = pthread_self();
    capture->origin = stream;
    capture->next = captures;
    captures = stream->capture = capture;
    return SUCCESS;
}

static struct graph *keep(struct graph **list, struct nodes nodes, const char *name) {
    struct graph *graph = calloc(1, sizeof *graph);
    graph->nodes = nodes;
    graph->next = *list;
    *list = graph;
    add("open", name, 1);
    return graph;
}

static void forget_capture(struct capture *gone) {
    struct capture **link = &captures;
    while (*link != gone)
        link = &(*link)->next;
    *link = gone->next;
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->capture == gone)
            stream->capture = NULL;
    for (struct event *event = events; event; event = event->next)
        if (event->capture == gone)
            event->capture = NULL;
    free(gone);
}

int cudaStreamEndCapture(void *handle, void **graph) {
    static struct counter call_ = {"call", __func__, 0, NULL, 0};
    LOCK;
    int refused = enter(&call_);
    struct stream *stream;
    *graph = NULL;
    int error = find_stream(handle, "cudaStreamEndCapture", &stream);
    if (error && error != CAPTURE_INVALIDATED)
        return error;
    struct capture *capture = stream ? stream->capture : NULL;
    if (!capture)
        return fail(ILLEGAL_STATE);
    if (capture->origin != stream)
        return breaks(capture, "cudaStreamEndCapture of another stream", CAPTURE_UNMATCHED);
    if (capture->mode != RELAXED && !pthread_equal(capture->thread, pthread_self()))
        return breaks(capture, "cudaStreamEndCapture by another thread", CAPTURE_WRONG_THREAD);
    struct nodes nodes = capture->nodes;
    if (capture->broken && !refused)
        refused = fail(CAPTURE_INVALIDATED);
    forget_capture(capture); /* also when it fails */
    if (refused)
        free(nodes.items);
    else
        *graph = keep(&graphs, nodes, "graph");
    return refused;
}

static struct graph *find_graph(struct graph *list, void *handle) {
    while (list && list != handle)
        list = list->next;
    return list;
}

int cudaGraphInstantiate(void **executable, void *handle, unsigned long long flags) {
    BEGIN;
    (void)flags;
    struct graph *graph = find_graph(graphs, handle);
    int error = forbidden("cudaGraphInstantiate");
    if (error || !graph)
        return error ? error : fail(INVALID_VALUE);
    struct nodes nodes = graph->nodes;
    nodes.room = nodes.used + 1;
    nodes.items = malloc(nodes.room * sizeof *nodes.items);
    memcpy(nodes.items, graph->nodes.items, nodes.used * sizeof *nodes.items);
    *executable = keep(&executables, nodes, "executable graph");
    return SUCCESS;
}

static int destroy(struct graph **list, void *handle, const char *name) {
    while (*list && *list != handle)
        list = &(*list)->next;
    struct graph *gone = *list;
    if (!gone)
        return fail(INVALID_VALUE);
    *list = gone->next;
    free(gone->nodes.items);
    free(gone);
    add("open", name, -1);
    return SUCCESS;
}

int cudaGraphDestroy(void *graph) {
    BEGIN;
    return destroy(&graphs, graph, "graph");
}

int cudaGraphExecDestroy(void *executable) {
    BEGIN;
    return destroy(&executables, executable, "executable graph");
}

int cudaGraphUpload(void *executable, void *stream) {
    BEGIN;
    (void)stream;
    return find_graph(executables, executable) ? SUCCESS : fail(INVALID_VALUE);
}

int cudaGraphLaunch(void *executable, void *handle) {
    BEGIN;
    struct stream *stream;
    struct graph *graph = find_graph(executables, executable);
    int error = find_stream(handle, "cudaGraphLaunch", &stream);
    if (error || !graph)
        return error ? error : fail(INVALID_VALUE);
    if (stream && stream->capture)
        return breaks(stream->capture, "cudaGraphLaunch", CAPTURE_UNSUPPORTED);
    for (size_t i = 0; i < graph->nodes.used; i++) {
        struct node *node = &graph->nodes.items[i];
        if (node->what == KERNEL)
            continue;
        struct node devices = *node; /* what the host gave was page-locked when it was captured */
        devices.from = block_of(locked, node->from, node->bytes) ? NULL : node->from;
        devices.to = block_of(locked, node->to, node->bytes) ? NULL : node->to;
        if (!valid(&devices))
            return fail(sticky_error = ILLEGAL_ADDRESS); /* memory that was freed since */
        carry_out(node, TO_HOST);
    }
    add("count", "graph launches", 1);
    add("count", "replayed launches", graph->nodes.kernels);
    return SUCCESS;
}

/* ── kernels ──────────────────────────────────────────────────────────────────────────────────────────── */

struct kernel {
    const void *function;
    const char *name;
    long launches;
    struct kernel *next;
};
#define BUCKETS 16384
static struct kernel *kernels[BUCKETS];

static struct kernel *kernel_of(const void *function) {
    struct kernel **bucket = &kernels[((uintptr_t)function >> 4) % BUCKETS], *kernel = *bucket;
    while (kernel && kernel->function != function)
        kernel = kernel->next;
    if (!kernel) {
        kernel = calloc(1, sizeof *kernel);
        kernel->function = function;
        kernel->name = "a kernel without a name";
        kernel->next = *bucket;
        *bucket = kernel;
    }
    return kernel;
}

static int enqueue(const char *name, void *handle, int *captured) {
    struct stream *stream;
    int error = find_stream(handle, name, &stream);
    if (error)
        return error;
    if (stream && stream->device != current_device)
        return fail(INVALID_RESOURCE_HANDLE);
    *captured = stream && stream->capture;
    if (*captured)
        record(stream->capture, (struct node){KERNEL, NULL, NULL, 0, 0, 0, 1, 0});
    return SUCCESS;
}

static int launch(const void *function, void *handle) {
    int captured = 0, error = enqueue("a kernel", handle, &captured);
    if (error)
        return error;
    struct kernel *kernel = kernel_of(function);
    if (captured && !kernel->launches)
        add("note", "a kernel was loaded in a capture", 1); /* its code is loaded when it is first launched */
    kernel->launches++;
    add(captured ? "captured" : "count", "launches", 1);
    return SUCCESS;
}

int stand_in_library_kernel(const char *name, void *stream) {
    LOCK;
    int captured = 0, error = enqueue(name, stream, &captured);
    if (!error)
        add(captured ? "captured" : "count", "library launches", 1);
    return error;
}

int cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    BEGIN;
    (void)grid, (void)block, (void)arguments, (void)shared;
    return launch(function, stream);
}

int __cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream) {
    BEGIN;
    (void)grid, (void)block, (void)arguments, (void)shared;
    return launch(function, stream);
}

int cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                void *stream) {
    BEGIN;
    (void)grid, (void)block, (void)arguments, (void)shared;
    return launch(function, stream);
}

/* cudaLaunchConfig_t: grid, block, shared memory; the stream lies at 32. */
int cudaLaunchKernelExC(const char *configuration, const void *function, void **arguments) {
    BEGIN;
    (void)arguments;
    return launch(function, *(void *const *)(configuration + 32));
}

int cudaLaunchHostFunc(void *handle, void (*function)(void *), void *data) {
    struct stream *stream;
    {
        BEGIN;
        int error = find_stream(handle, "cudaLaunchHostFunc", &stream);
        if (error)
            return error;
        if (stream && stream->capture) /* would have to be called by every launch of the graph */
            return breaks(stream->capture, "cudaLaunchHostFunc", CAPTURE_UNSUPPORTED);
        add("count", "host functions", 1);
    }
    function(data); /* without the lock: it may call anything */
    return SUCCESS;
}

int __cudaGetKernel(void **kernel, const void *function) {
    BEGIN;
    *kernel = (void *)function;
    return SUCCESS;
}

int cudaLibraryLoadData(void **library) {
    BEGIN;
    int error = forbidden("cudaLibraryLoadData");
    *library = error ? NULL : malloc(1);
    return error;
}

int cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    BEGIN;
    (void)library, (void)name;
    *kernel = malloc(16);
    return SUCCESS;
}

int cudaLibraryUnload(void *library) {
    BEGIN;
    int error = forbidden("cudaLibraryUnload");
    if (!error)
        free(library);
    return error;
}

int cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
    BEGIN;
    (void)kernel, (void)attribute, (void)value, (void)device;
    return SUCCESS;
}

/* cudaFuncAttributes has 144 bytes; maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion lie at 24. */
int cudaFuncGetAttributes(char *attributes, const void *function) {
    BEGIN;
    (void)function;
    memset(attributes, 0, 144);
    const int numbers[] = {1024, 32, 90, 90, 0, 232448};
    memcpy(attributes + 24, numbers, sizeof numbers);
    return SUCCESS;
}

int cudaFuncSetAttribute(const void *function, int attribute, int value) {
    BEGIN;
    (void)function, (void)attribute, (void)value;
    return SUCCESS;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *number, const void *function, int size,
                                                           size_t shared, unsigned flags) {
    BEGIN;
    (void)function, (void)size, (void)shared, (void)flags;
    *number = 2;
    return SUCCESS;
}

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} launching;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    launching.grid = grid, launching.block = block;
    launching.shared = shared, launching.stream = stream;
    return 0;
}

int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = launching.grid, *block = launching.block;
    *shared = launching.shared, *stream = launching.stream;
    return SUCCESS;
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    (void)binary;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
void __cudaRegisterVar(void) {}
void __cudaRegisterFunction(void **handle, const void *function, char *device_function, const char *name) {
    LOCK;
    (void)handle, (void)device_function;
    kernel_of(function)->name = name;
}

/* ── the report ───────────────────────────────────────────────────────────────────────────────────────── */

/* Lines of kind, name and number, separated by tabs; the caller frees the text with stand_in_free. */
char *stand_in_report(void) {
    LOCK;
    char *text = NULL;
    size_t size = 0;
    FILE *file = open_memstream(&text, &size);
    for (struct counter *counter = counters; counter; counter = counter->next)
        fprintf(file, "%s\t%s\t%ld\n", counter->kind, counter->name, counter->number);
    for (size_t i = 0; i < BUCKETS; i++)
        for (struct kernel *kernel = kernels[i]; kernel; kernel = kernel->next)
            if (kernel->launches)
                fprintf(file, "kernel\t%s\t%ld\n", kernel->name, kernel->launches);
    fprintf(file, "memory\tused\t%zu\nmemory\ttotal\t%zu\n", used_memory, total_memory);
    fclose(file);
    return text;
}

void stand_in_free(char *text) { free(text); }
