// unpack_tiles on the CPU: launch(grid, arguments, bytes of shared memory).
#include "emulator.h"
#include KERNEL

extern "C" void launch(int x, int y, int z, const Arguments *a, long bytes) {
    if (bytes != MEMORY) abort();
    unsigned char *memory = (unsigned char *)aligned_alloc(128, (bytes + 127) / 128 * 128);
    emulator::run(THREADS, {x, y, z}, memory, bytes, [&] { unpack_block(*a, memory); });
    free(memory);
}
