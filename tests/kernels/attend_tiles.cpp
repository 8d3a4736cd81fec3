// Decode attention on the CPU: launch(grid, arguments, bytes of shared memory).
#include "emulator.h"
#include KERNEL

extern "C" void launch(int x, int y, int z, const Arguments *a, long bytes) {
    unsigned char *memory = (unsigned char *)aligned_alloc(128, (bytes + 127) / 128 * 128);
    emulator::run(THREADS, {x, y, z}, memory, bytes, [&] { attend_block(*a, memory); });
    free(memory);
}
