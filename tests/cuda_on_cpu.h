// Runs a CUDA kernel's source on the CPU, for tests: the threads of a block are coroutines of one thread.
//
// A coroutine runs until it waits for its warp (a shuffle) or its block (__syncthreads); then the next one runs,
// in rising or in falling order. So a kernel whose result depends on an order that CUDA does not promise gives
// another one when the order is turned round, and a barrier that not all threads come to is an error here.

#include <cmath>
#include <csetjmp>
#include <cstring>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

using std::cos;
using std::erf;
using std::exp;
using std::expm1;
using std::log;
using std::sqrt;
using std::tanh;

#define __global__
#define __device__ static
#define __shared__ static volatile  // others write to it while a thread waits

struct Index {
    int x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

enum State { READY, AT_WARP, AT_BLOCK, DONE };
enum Problem { FINE, WRONG_ARGUMENTS, NOT_ALL_AT_BARRIER, SHUFFLE_WITH_THE_DEAD };

struct Thread {
    ucontext_t context;  // to begin with
    jmp_buf place;       // to go on from: unlike swapcontext, no call to the system
    bool begun;
    Index index;
    State state;
    char exchanged[2][8];  // by turns: who is ahead does not overwrite what others have not read
    int turn;
};

static const int STACK = 64 * 1024;
static std::vector<Thread> threads;
static std::vector<char> stacks;
static Thread* now;
static jmp_buf scheduler;
static Problem problem;

static void wait_at(State state) {
    now->state = state;
    if (!_setjmp(now->place)) _longjmp(scheduler, 1);
}

static void resume(Thread& thread) {
    now = &thread;
    threadIdx = thread.index;
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    setcontext(&thread.context);
}

static void __syncthreads() { wait_at(AT_BLOCK); }

static void __syncwarp() { wait_at(AT_WARP); }

static void __threadfence() {}  // blocks run one after the other

static int atomicAdd(int* at, int value) {
    int before = *at;
    *at += value;
    return before;
}

template <class Value>
static Value __shfl_xor_sync(unsigned mask, Value value, int far) {
    int me = int(now - threads.data()), turn = now->turn++ % 2;
    memcpy(now->exchanged[turn], &value, sizeof value);
    wait_at(AT_WARP);
    Thread* other = me / 32 == (me ^ far) / 32 && (me ^ far) < int(threads.size()) ? &threads[me ^ far] : nullptr;
    if (!other || other->turn < now->turn || mask != 0xffffffffu) {
        problem = SHUFFLE_WITH_THE_DEAD;
        other = now;
    }
    memcpy(&value, other->exchanged[turn], sizeof value);
    return value;
}

static bool all_live_are(State state, size_t first, size_t last) {
    bool any = false;
    for (size_t i = first; i < last; i++) {
        if (threads[i].state == DONE) continue;
        if (threads[i].state != state) return false;
        any = true;
    }
    return any;
}

static void release(size_t first, size_t last) {
    for (size_t i = first; i < last; i++) {
        if (threads[i].state != DONE) threads[i].state = READY;
    }
}

// until all threads are done -> whether they could be
static bool run_block(bool falling) {
    size_t n = threads.size();
    for (;;) {
        bool went = false;
        for (size_t i = 0; i < n; i++) {
            Thread& thread = threads[falling ? n - 1 - i : i];
            if (thread.state != READY) continue;
            went = true;
            resume(thread);
        }
        for (size_t first = 0; first < n; first += 32) {
            size_t last = first + 32 < n ? first + 32 : n;
            if (all_live_are(AT_WARP, first, last)) {
                release(first, last);
                went = true;
            }
        }
        if (all_live_are(AT_BLOCK, 0, n)) {
            release(0, n);
            went = true;
        }
        if (!went) {
            for (Thread& thread : threads) {
                if (thread.state != DONE) return false;
            }
            return true;
        }
    }
}

static void (*body)(void*);
static void* body_of;

static void enter() {
    body(body_of);
    now->state = DONE;
    _longjmp(scheduler, 1);
}

template <class Type>
static bool fits(char kind, int size) {
    char wanted = std::is_pointer<Type>::value          ? 'p'
                  : std::is_floating_point<Type>::value ? 'f'
                  : std::is_unsigned<Type>::value       ? 'u'
                                                        : 'i';
    return kind == wanted && size == int(sizeof(Type));
}

template <class... Types, size_t... I>
static int launch_with(
    void (*kernel)(Types...), void** values, const char* kinds, const int* sizes, const int* grid, const int* block,
    int falling, int waits, std::index_sequence<I...>) {
    if (!(fits<Types>(kinds[I], sizes[I]) && ...)) return WRONG_ARGUMENTS;
    auto call = [&] { kernel(*static_cast<Types*>(values[I])...); };
    body = [](void* it) { (*static_cast<decltype(call)*>(it))(); };
    body_of = &call;
    problem = FINE;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    size_t n = size_t(block[0]) * block[1] * block[2];
    threads.resize(n);
    stacks.resize(n * STACK);
    int blocks = grid[0] * grid[1] * grid[2];
    for (int at = 0; at < blocks; at++) {
        int b = falling ? blocks - 1 - at : at;
        blockIdx = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
        for (int i = 0; i < int(n); i++) {
            Thread& thread = threads[i];
            thread.index = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
            if (!waits) {
                threadIdx = thread.index;
                call();
                continue;
            }
            thread.state = READY;
            thread.begun = false;
            thread.turn = 0;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = &stacks[size_t(i) * STACK];
            thread.context.uc_stack.ss_size = STACK;
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, enter, 0);
        }
        if (waits && !run_block(falling)) return NOT_ALL_AT_BARRIER;
    }
    return problem;
}

template <class... Types>
static int launch(
    void (*kernel)(Types...), int count, void** values, const char* kinds, const int* sizes, const int* grid,
    const int* block, int falling, int waits) {
    if (count != int(sizeof...(Types))) return WRONG_ARGUMENTS;
    return launch_with(
        kernel, values, kinds, sizes, grid, block, falling, waits, std::index_sequence_for<Types...>());
}
