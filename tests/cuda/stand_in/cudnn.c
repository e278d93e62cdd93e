/* libcudnn of the stand-in: the graph interface ("backend"), which offers one engine without workspace for
 * whatever it is asked. The rest is written by the build.
 * ABI: cuDNN 9, x86-64 (cudnn_graph.h). */

#include "stand_in.h"

#include <stdint.h>

enum { EXECUTION_PLAN = 5 };                                   /* cudnnBackendDescriptorType_t */
enum { BOOLEAN = 2, INT64 = 3, NUMERICAL_NOTE = 11, BEHAVIOR_NOTE = 19, INT32 = 23 }; /* cudnnBackendAttributeType_t */
enum { ENGINECFG_KNOB_CHOICES = 302, ENGINE_GLOBAL_INDEX = 1301 }; /* cudnnBackendAttributeName_t */

struct descriptor {
    int kind;
    char room[508];
};

size_t cudnnGetVersion(void) { return 91300; }

void cudnnGetLastErrorString(char *text, size_t size) {
    if (size)
        text[0] = 0;
}

int cudnnGetStream(void **handle, void **stream) {
    ENTER;
    *stream = *handle;
    return 0;
}

int cudnnBackendCreateDescriptor(int kind, struct descriptor **made) {
    ENTER;
    *made = calloc(1, sizeof **made);
    (*made)->kind = kind;
    stand_in_add("count", "cuDNN descriptors", 1);
    stand_in_add("open", "cuDNN descriptor", 1);
    return 0;
}

int cudnnBackendDestroyDescriptor(struct descriptor *gone) {
    ENTER;
    if (gone)
        stand_in_add("open", "cuDNN descriptor", -1);
    free(gone);
    return 0;
}

int cudnnBackendSetAttribute(void) {
    ENTER;
    return 0;
}

/* Descriptors that are asked for are the caller's own, and stay as they are. */
int cudnnBackendGetAttribute(struct descriptor *of, int name, int type, int64_t room, int64_t *count, void *values) {
    ENTER;
    (void)of;
    int none = name == ENGINECFG_KNOB_CHOICES || type == NUMERICAL_NOTE || type == BEHAVIOR_NOTE;
    if (count)
        *count = !none;
    if (none || !values || room < 1)
        return 0;
    if (type == INT64)
        *(int64_t *)values = name == ENGINE_GLOBAL_INDEX ? 7 : 0;
    else if (type == INT32 || type == BOOLEAN)
        *(int *)values = 0;
    return 0;
}

int cudnnBackendFinalize(struct descriptor *made) {
    ENTER;
    if (made->kind == EXECUTION_PLAN) {
        stand_in_add("count", "cuDNN plans", 1);
        if (stand_in_capturing())
            stand_in_add("note", "a plan was built in a capture", 1);
    }
    return 0;
}

int cudnnBackendExecute(void **handle, struct descriptor *plan, struct descriptor *pack) {
    ENTER;
    (void)plan, (void)pack;
    return stand_in_library_kernel("cudnnBackendExecute", *handle);
}
