/* All that one instruction set has, under the NAME, V, TILE_* and LANES that native.c gives it. */

#include "simd.h"
#include "conv.h"
#include "each.h"
#include "step.h"
#include "rows.h"
#include "codec.h"
#include "normal.h"

#undef NAME
#undef V
#undef TILE_B
#undef TILE_N
#undef TILE_M
#undef CONV_M
#undef CONV_WIDE
#undef CONV_G
#undef LANES
#undef vec
#undef LOAD
#undef STORE
