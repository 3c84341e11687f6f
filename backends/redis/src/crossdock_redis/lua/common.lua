-- What the scripts share; put before each of them. The keys are explained in keys.py, the stored value in record.py.
--
-- P        prefix of a queue's keys: KEYS[1], or another of KEYS where a script serves several queues
-- now      the server's clock, milliseconds since the Unix epoch; all deadlines and due times are in this unit
-- level    a priority level as it is in key names: 9, 6, 3 or 0
-- fresh    set of levels that something became ready at during this script

local P = KEYS[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local BATCH = 1000       -- most ids in one call of a command: Lua's stack holds not many more arguments
local MEMO = 60000       -- for how long the answer to a request is remembered, in case it is asked again

-- A stored value: level digit, flag byte, 2 bytes lost hand-overs, 4 bytes generation, 8 bytes since or due, then the body.
local function level_of(value) return string.sub(value, 1, 1) end
local function due_at(value, due)
  return string.sub(value, 1, 1) .. '\1' .. string.sub(value, 3, 8) .. struct.pack('>I8', due) .. string.sub(value, 17)
end

-- The memo of a lane holds its last token and what was answered. nil: not asked before. false: a late double of a request whose
-- lane has moved on, do nothing. Else the answer given to this very request.
local function recall(token)
  local memo = redis.call('GET', P .. 'm' .. string.sub(token, 1, 6))
  if not memo then return nil end
  local last = string.sub(memo, 1, 12)
  if last == token then return string.sub(memo, 13) end
  if last > token then return false end
  return nil
end
local function remember(token, answer)
  redis.call('SET', P .. 'm' .. string.sub(token, 1, 6), token .. answer, 'PX', MEMO)
end

-- One token at most waits for the next idle receiver of a level.
local function wake(P, level)
  if redis.call('EXISTS', P .. 'w' .. level) == 0 then redis.call('RPUSH', P .. 'w' .. level, 1) end
end
