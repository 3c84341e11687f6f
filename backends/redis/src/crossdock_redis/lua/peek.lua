-- Shows messages of one state, in order, and changes nothing but what time has changed already.
--
-- KEYS[1]      prefix of the queue
-- ARGV[1]      state: ready, scheduled, leased or dead
-- ARGV[2]      most entries to show, up to 1,000; 0: those whose ids follow, whatever their number up to 1,000
-- then         ids; or the place behind which to go on: two texts, none for the start
--                ready: level, place in its list    scheduled, dead: score, member    leased: score, then its member of x and the id
-- returns      nil: ask again, time has more to do. Else {entries, place}; the place is {} where this is the last page.
--   entries    flat: id, value, in order

local state, most = ARGV[1], tonumber(ARGV[2])
if catch_up(P) then return false end

local entries, last, more = {}, {}, false
-- Adds an entry and its place, unless the page is full: then there is more.
local function show(id, value, place)
  local n = #entries
  if most > 0 and n == 2 * most then
    more = true
  else
    entries[n + 1], entries[n + 2] = id, value
    last = place
  end
end

-- Order of bytes; Lua's own follows the server's language.
local function is_before(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x < y end
  end
  return #a < #b
end

-- Index of the first member of a sorted set behind (score, member), whether or not that is there.
local function rank_behind(key, score, member)
  local low = redis.call('ZCOUNT', key, '-inf', '(' .. score)
  local high = low + redis.call('ZCOUNT', key, score, score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    local there = redis.call('ZRANGE', key, middle, middle)[1]
    if there == member or is_before(there, member) then low = middle + 1 else high = middle end
  end
  return low
end

if most == 0 then
  for i = 3, #ARGV do
    local id = ARGV[i]
    local value = redis.call('HGET', P .. 'b', id)
    if value then
      local due, dead = redis.call('ZSCORE', P .. 's', level_of(value) .. id), redis.call('ZSCORE', P .. 'd', id)
      local leased = redis.call('SISMEMBER', P .. 'l', id) == 1
      if state == 'dead' and dead then show(id, value)
      elseif state == 'scheduled' and due then show(id, value)
      elseif state == 'leased' and leased then show(id, value)
      elseif state == 'ready' and not (due or dead or leased) then show(id, value) end
    end
  end
elseif state == 'ready' then
  local begun = not ARGV[3]
  for _, level in ipairs({'9', '6', '3', '0'}) do
    local gone = tonumber(redis.call('HGET', P .. 'q', 'h' .. level) or 0)
    local index = 0
    if not begun and ARGV[3] == level then
      begun = true
      index = math.max(0, ARGV[4] + 1 - gone)
    end
    while begun and not more do
      local ids = redis.call('LRANGE', P .. 'r' .. level, index, index + most)
      if #ids == 0 then break end
      for i, value in ipairs(redis.call('HMGET', P .. 'b', unpack(ids))) do
        if value then show(ids[i], value, {level, string.format('%.0f', gone + index + i - 1)}) end
      end
      index = index + #ids
    end
  end
elseif state == 'leased' then
  local first, skip = 0, nil
  if ARGV[3] then
    local batch = string.match(ARGV[4], '^[^ ]*')
    first, skip = rank_behind(P .. 'x', ARGV[3], batch), string.sub(ARGV[4], #batch + 2)
    local score = redis.call('ZSCORE', P .. 'x', batch)
    if score and tonumber(score) == tonumber(ARGV[3]) then first = first - 1 else skip = nil end
  end
  while not more do
    local found = redis.call('ZRANGE', P .. 'x', first, first, 'WITHSCORES')
    if #found == 0 then break end
    local batch, only = batch_of(found[1])
    local ids = only and {only} or redis.call('SMEMBERS', P .. 'g' .. batch)
    table.sort(ids, is_before)
    for _, id in ipairs(ids) do
      if not more and (not skip or is_before(skip, id)) then
        show(id, redis.call('HGET', P .. 'b', id), {found[2], found[1] .. ' ' .. id})
      end
    end
    first, skip = first + 1, nil
  end
else
  local key = P .. (state == 'dead' and 'd' or 's')
  local first = ARGV[3] and rank_behind(key, ARGV[3], ARGV[4]) or 0
  local found = redis.call('ZRANGE', key, first, first + most, 'WITHSCORES')
  local ids = {}
  for i = 1, #found, 2 do ids[#ids + 1] = state == 'dead' and found[i] or string.sub(found[i], 2) end
  if #ids > 0 then
    for i, value in ipairs(redis.call('HMGET', P .. 'b', unpack(ids))) do
      show(ids[i], value, {found[2 * i], found[2 * i - 1]})
    end
  end
end
return {entries, more and last or {}}
