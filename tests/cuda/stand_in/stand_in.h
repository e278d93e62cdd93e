/* What the libraries of the stand-in share: counters, injected failures, and who is capturing.
 *
 * All of it lives in libcudart; the other libraries are linked with that one. Read and set from Python by
 * `tests/cuda/libraries.py`. */

#ifndef STAND_IN_H
#define STAND_IN_H

#include <stddef.h>
#include <stdlib.h>

/* One function of a library, or one kind of event: a line of the report. */
struct counter {
    const char *kind, *name;
    long number;
    struct counter *next;
    int listed;
};

/* Count a call. Returns the error that a test injected for it, else 0. */
int stand_in_enter(struct counter *call);

/* Count an event of this name, beside the calls: "note", "open", "count". */
void stand_in_add(const char *kind, const char *name, long number);

/* What a library does to make the GPU compute: like a kernel launch of our own, on the stream. */
int stand_in_library_kernel(const char *name, void *stream);

/* Whether this thread's calls are recorded: 0, or the error of a call that no capture allows, which is noted
 * and ends the capture. */
int stand_in_forbidden(const char *name);
int stand_in_capturing(void);

/* First statement of every exported function whose result is an error code. */
#define ENTER                                                                                                \
    static struct counter call_ = {"call", __func__, 0, NULL, 0};                                            \
    int refused_ = stand_in_enter(&call_);                                                                   \
    if (refused_)                                                                                            \
        return refused_

/* Entries that tests/cuda/libraries.py writes for each function that the provider imports. They are weak: what is
 * written by hand takes their place. A handle is the address of the stream it was given. */
#define WEAK __attribute__((weak))

#define CREATE(function)                                                                                     \
    WEAK int function(void **handle) {                                                                       \
        ENTER;                                                                                               \
        *handle = calloc(1, 4096);                                                                           \
        stand_in_add("open", "handle", 1);                                                                   \
        return 0;                                                                                            \
    }
#define DESTROY(function)                                                                                    \
    WEAK int function(void *handle) {                                                                        \
        ENTER;                                                                                               \
        free(handle);                                                                                        \
        stand_in_add("open", "handle", -1);                                                                  \
        return 0;                                                                                            \
    }
#define SET_STREAM(function)                                                                                 \
    WEAK int function(void **handle, void *stream) {                                                         \
        ENTER;                                                                                               \
        *handle = stream;                                                                                    \
        return 0;                                                                                            \
    }
#define COMPUTE(function)                                                                                    \
    WEAK int function(void **handle) {                                                                       \
        ENTER;                                                                                               \
        return stand_in_library_kernel(#function, *handle);                                                  \
    }
#define ANSWER(function, status)                                                                             \
    WEAK int function(void) {                                                                                \
        ENTER;                                                                                               \
        return status;                                                                                       \
    }
#define TEXT(function)                                                                                       \
    WEAK const char *function(int status) { return status ? "refused by the stand-in" : "success"; }

#endif
