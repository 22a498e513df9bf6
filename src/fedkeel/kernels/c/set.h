/* All that one instruction set has, under the NAME, V, TILE_* and LANES that native.c gives it. */

#include "simd.h"
#include "step.h"
#include "rows.h"

#undef NAME
#undef V
#undef TILE_B
#undef TILE_N
#undef TILE_M
#undef LANES
#undef vec
#undef LOAD
#undef STORE
