/* AMX tiles on a CPU that has none: whether kernels use them rightly, not how fast.
 *
 * On such a CPU a tile instruction is an illegal one. The signal handler here decodes it, does in C what the Intel SDM
 * (volume 2, and volume 1 chapter 18) says that it does, and goes on behind it. What the SDM forbids (products of tiles
 * that do not fit, tiles without a configuration) ends the process with a line, where that CPU would send a signal.
 *
 * emulated_amx.py builds and loads it.
 */

#define _GNU_SOURCE
#include <immintrin.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, CONFIGURATION_BYTES = 64 };
enum { NEAREST_WITHOUT_DENORMALS = 0x9FC0 }; /* MXCSR: as the SDM says that tiles are multiplied */

typedef union {
    uint8_t bytes[ROWS][ROW_BYTES];
    uint16_t bf16[ROWS][ROW_BYTES / 2];
    float fp32[ROWS][ROW_BYTES / 4];
} Tile;

/* One thread's tile state. Its first use is in a handler, but never of a signal that came inside malloc. */
static __thread struct {
    int configured, rows[TILES], row_bytes[TILES];
    uint8_t configuration[CONFIGURATION_BYTES];
    Tile tiles[TILES];
} state;

static struct sigaction before;

/* How many instructions were done for all threads: what shows that tiles were used at all. */
static uint64_t count;

uint64_t amx_emulated(void) { return __atomic_load_n(&count, __ATOMIC_RELAXED); }

static void refuse(const char *why) {
    char line[160];
    int length = snprintf(line, sizeof line, "amx_emulator: general protection or undefined opcode: %s\n", why);
    if (write(STDERR_FILENO, line, (size_t)length) < 0) _exit(1);
    abort();
}

static void must(int holds, const char *what) {
    if (!holds) refuse(what);
}

static float float_of_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static void check_tile(int tile) {
    must(state.configured, "a tile before its configuration");
    must(state.rows[tile] > 0 && state.row_bytes[tile] > 0, "a tile that the configuration leaves out");
}

static void ldtilecfg(const uint8_t *from) {
    memset(&state, 0, sizeof state);
    if (from[0] == 0) return;
    must(from[0] == 1, "ldtilecfg: palette");
    for (int i = 1; i < 16; i++) must(from[i] == 0, "ldtilecfg: start row and reserved bytes");
    for (int i = 0; i < 16; i++) {
        int row_bytes = from[16 + 2 * i] | from[17 + 2 * i] << 8, rows = from[48 + i];
        must(i < TILES || (rows == 0 && row_bytes == 0), "ldtilecfg: tiles beyond the eighth");
        must(rows <= ROWS && row_bytes <= ROW_BYTES, "ldtilecfg: a tile that is too large");
        must((rows == 0) == (row_bytes == 0), "ldtilecfg: rows without columns, or columns without rows");
        if (i < TILES) state.rows[i] = rows, state.row_bytes[i] = row_bytes;
    }
    memcpy(state.configuration, from, CONFIGURATION_BYTES);
    state.configured = 1;
}

static void tileload(int tile, const uint8_t *from, int64_t stride) {
    check_tile(tile);
    memset(&state.tiles[tile], 0, sizeof(Tile));
    for (int row = 0; row < state.rows[tile]; row++)
        memcpy(state.tiles[tile].bytes[row], from + row * stride, (size_t)state.row_bytes[tile]);
}

static void tilestore(int tile, uint8_t *to, int64_t stride) {
    check_tile(tile);
    for (int row = 0; row < state.rows[tile]; row++)
        memcpy(to + row * stride, state.tiles[tile].bytes[row], (size_t)state.row_bytes[tile]);
}

/* C[m, n] += sum over pairs k of A[m, 2k] B[k, 2n] and of A[m, 2k + 1] B[k, 2n + 1], each sum for itself. */
static __attribute__((noinline)) void multiply_add(Tile *c, const Tile *a, const Tile *b, int rows, int pairs) {
    for (int m = 0; m < rows; m++) {
        float even[ROW_BYTES / 4] = {0}, odd[ROW_BYTES / 4] = {0};
        for (int k = 0; k < pairs; k++) {
            float first = float_of_bf16(a->bf16[m][2 * k]), second = float_of_bf16(a->bf16[m][2 * k + 1]);
            for (int n = 0; n < ROW_BYTES / 4; n++) {
                even[n] = fmaf(first, float_of_bf16(b->bf16[k][2 * n]), even[n]);
                odd[n] = fmaf(second, float_of_bf16(b->bf16[k][2 * n + 1]), odd[n]);
            }
        }
        for (int n = 0; n < ROW_BYTES / 4; n++) c->fp32[m][n] += even[n] + odd[n];
    }
    for (int m = rows; m < ROWS; m++) memset(c->bytes[m], 0, ROW_BYTES);
}

static void tdpbf16ps(int c, int a, int b) {
    check_tile(c), check_tile(a), check_tile(b);
    must(c != a && c != b && a != b, "tdpbf16ps: a tile twice");
    must(state.row_bytes[a] % 4 == 0 && state.row_bytes[b] % 4 == 0, "tdpbf16ps: half a pair");
    must(state.rows[a] == state.rows[c], "tdpbf16ps: rows of A and C");
    must(state.row_bytes[b] == state.row_bytes[c], "tdpbf16ps: columns of B and C");
    must(state.row_bytes[a] / 4 == state.rows[b], "tdpbf16ps: columns of A and rows of B");
    unsigned was = _mm_getcsr();
    _mm_setcsr(NEAREST_WITHOUT_DENORMALS);
    multiply_add(&state.tiles[c], &state.tiles[a], &state.tiles[b], state.rows[c], state.row_bytes[a] / 4);
    _mm_setcsr(was);
}

/* --- decoding: C4, two bytes of VEX, opcode, ModRM, SIB, displacement (SDM volume 2, 2.3 and 2.1.5) --------------- */

static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

typedef struct {
    int opcode, prefix, reg, rm, vvvv, is_memory, length;
    uint8_t *address; /* base, scale * index left out where `stride` holds it, displacement */
    int64_t stride;   /* scale * index */
} Instruction;

/* The 128-bit VEX instruction of the map 0F38 with W = 0 at `at`; 0 if there is another one. */
static int decode(const uint8_t *at, const greg_t *registers, Instruction *found) {
    if (at[0] != 0xC4 || (at[1] & 0x1F) != 2 || (at[2] & 0x84) != 0) return 0;
    int r = !(at[1] & 0x80), x = !(at[1] & 0x40), b = !(at[1] & 0x20), mod = at[4] >> 6, rm = at[4] & 7, length = 5;
    *found = (Instruction){.opcode = at[3], .prefix = at[2] & 3, .vvvv = ~(at[2] >> 3) & 15};
    found->reg = (at[4] >> 3 & 7) | r << 3, found->rm = rm | b << 3, found->is_memory = mod != 3;
    if (mod != 3) {
        int64_t base = 0;
        int wide = mod == 2;
        if (rm == 4) {
            int sib = at[length++], index = (sib >> 3 & 7) | x << 3;
            if (index != 4) found->stride = registers[REGISTERS[index]] << (sib >> 6);
            if ((sib & 7) == 5 && mod == 0) wide = 1;
            else base = registers[REGISTERS[(sib & 7) | b << 3]];
        } else if (rm == 5 && mod == 0) {
            wide = 1, base = registers[REG_RIP] + length + 4; /* what follows is four bytes, and no immediate */
        } else {
            base = registers[REGISTERS[rm | b << 3]];
        }
        int32_t wide_offset = 0;
        if (wide) memcpy(&wide_offset, at + length, 4), base += wide_offset, length += 4;
        else if (mod == 1) base += (int8_t)at[length++];
        found->address = (uint8_t *)base;
    }
    found->length = length;
    return 1;
}

/* Do it; 0 if it is no tile instruction that is known here. */
static int perform(const Instruction *i) {
    enum { NONE, P66, PF3, PF2 };
    if (i->reg >= TILES || (i->opcode == 0x5C && (i->rm >= TILES || i->vvvv >= TILES))) return 0;
    if (i->opcode == 0x4B && (i->rm & 7) != 4) return 0; /* rows are addressed by a SIB byte alone */
    switch (i->opcode << 8 | i->prefix) {
        case 0x49 << 8 | NONE:
            if (i->is_memory) ldtilecfg(i->address + i->stride);
            else memset(&state, 0, sizeof state); /* tilerelease */
            return 1;
        case 0x49 << 8 | P66:
            memcpy(i->address + i->stride, state.configuration, CONFIGURATION_BYTES);
            return i->is_memory;
        case 0x49 << 8 | PF2:
            check_tile(i->reg);
            memset(&state.tiles[i->reg], 0, sizeof(Tile));
            return !i->is_memory;
        case 0x4B << 8 | PF2:
        case 0x4B << 8 | P66:
            tileload(i->reg, i->address, i->stride);
            return i->is_memory;
        case 0x4B << 8 | PF3:
            tilestore(i->reg, i->address, i->stride);
            return i->is_memory;
        case 0x5C << 8 | PF3:
            tdpbf16ps(i->reg, i->rm, i->vvvv);
            return !i->is_memory;
    }
    return 0;
}

static void on_illegal_instruction(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    Instruction instruction;
    if (decode((const uint8_t *)registers[REG_RIP], registers, &instruction) && perform(&instruction)) {
        registers[REG_RIP] += instruction.length;
        __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED);
    } else {
        sigaction(SIGILL, &before, NULL); /* it is met again, and is whoever's it was before */
    }
}

int amx_emulate(void) {
    struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    return sigaction(SIGILL, &action, &before);
}
